"""Write a short config of your own that extends a shipped one and runs from any folder."""

import argparse
from pathlib import Path

from diffengine import config
from diffengine.errors import UserError

SECTION = "# train_dataloader = dict(skip_unreadable=True)"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="a shipped config (see list-cfg)")
    parser.add_argument("file", help="the .py file to write")


def run(options: argparse.Namespace) -> int:
    if options.name not in config.shipped():
        config.find(options.name)  # names the nearest
        raise UserError(f"copy-cfg got '{options.name}'; expected a shipped name, see `diffengine list-cfg`")
    path = Path(options.file)
    if path.suffix != ".py":
        raise UserError(f"copy-cfg got '{path}'; expected a file name that ends in .py")
    if path.exists():
        raise UserError(f"'{path}' exists; choose another name, or delete it first")
    settings = {key: value for key, value in config.read(options.name).items() if key not in config.SECTIONS}
    lines = [
        f"# My own {options.name}. Remove the # before a line to change it; all else is as shipped.",
        f"# Train it: diffengine train {path}",
        f"extends = {options.name!r}",
        "",
        *(f"# {key} = {value!r}" for key, value in settings.items()),
        "",
        "# A section merges into the shipped one:",
        SECTION,
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error}") from error
    print(f"wrote {path}; train it with: diffengine train {path}")
    return 0
