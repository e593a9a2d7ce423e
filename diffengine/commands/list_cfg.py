"""List the shipped configs, each with the first line of its description."""

import argparse
import ast
import fnmatch

from diffengine import config
from diffengine.errors import require
from diffengine.terminal import say


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", help="a substring of the name, or a pattern: 'vq_*'")


def run(options: argparse.Namespace) -> int:
    shipped, pattern = config.shipped(), options.pattern
    names = fnmatch.filter(shipped, pattern if set(pattern) & set("*?[") else f"*{pattern}*")
    require(bool(names), f"no shipped config matches '{pattern}'; there are {', '.join(shipped)}")
    width = max(map(len, names))
    for name in names:
        doc = ast.get_docstring(ast.parse(shipped[name].read_text(encoding="utf-8"))) or ""
        say(f"{name:{width}}  {doc.splitlines()[0] if doc else ''}")
    return 0
