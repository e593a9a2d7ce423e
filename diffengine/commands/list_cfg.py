"""List the shipped configs, each with the first line of its description."""

import argparse
import ast
import fnmatch

from diffengine import config
from diffengine.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", help="part of a name, or a pattern: 'vq_*'")


def run(options: argparse.Namespace) -> int:
    shipped = config.shipped()
    pattern = options.pattern if set(options.pattern) & set("*?[") else f"*{options.pattern}*"
    names = fnmatch.filter(shipped, pattern)
    if not names:
        raise UserError(f"no shipped config matches '{options.pattern}'; there are {', '.join(shipped)}")
    width = max(map(len, names))
    for name in names:
        doc = ast.get_docstring(ast.parse(shipped[name].read_text(encoding="utf-8"))) or ""
        print(f"{name:{width}}  {doc.splitlines()[0] if doc else ''}")
    return 0
