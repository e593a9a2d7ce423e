"""Write a short config of your own that extends a shipped one and runs from any folder."""

import argparse
from pathlib import Path

from diffengine import config
from diffengine.errors import UserError, require
from diffengine.terminal import say


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="a shipped config (see list-cfg)")
    parser.add_argument("file", help="the .py file to write")


def run(options: argparse.Namespace) -> int:
    name, path = options.name, Path(options.file)
    config.find(name)  # an unknown name gets the nearest one in the error
    require(name in config.shipped(), f"copy-cfg got '{name}'; expected a shipped name, see `diffengine list-cfg`")
    require(path.suffix == ".py", f"copy-cfg got '{path}'; expected a file name that ends in .py")
    require(not path.exists(), f"'{path}' exists; choose another name, or delete it first")
    lines = [
        f"# My own {name}. Remove the # before a line to change it; all else is as shipped.",
        f"# Train it: diffengine train {path}",
        f"extends = {name!r}",
        "",
        *(f"# {key} = {value!r}" for key, value in config.read(name).items() if key not in config.SECTIONS),
        "",
        "# A section merges into the shipped one:",
        "# train_dataloader = dict(skip_unreadable=True)",
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error}") from error
    say(f"wrote {path}; train it with: diffengine train {path}")
    return 0
