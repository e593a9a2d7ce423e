"""The `diffengine` command. A command's imports happen inside it, so `--help` is instant."""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from diffengine import __version__
from diffengine.errors import UserError

COMMANDS = {
    "train": "train a config",
    "convert": "write a checkpoint's trained components in diffusers' form",
    "sample": "draw pictures with a pipeline folder or a work dir",
    "list-cfg": "list the shipped configs",
    "copy-cfg": "write a config of your own that extends a shipped one",
}


def parser() -> argparse.ArgumentParser:
    """The command line; each command's arguments are added by its own module's `arguments`."""
    top = argparse.ArgumentParser(
        prog="diffengine", description="Train aMUSEd, text-to-image by masked image modelling."
    )
    top.add_argument("--version", action="version", version=f"diffengine {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        module = _module(name)
        sub = commands.add_parser(name, help=summary, description=module.__doc__.split("\n\n")[0])
        module.arguments(sub)
    return top


def _module(command: str) -> "importlib.types.ModuleType":  # type: ignore[name-defined]
    return importlib.import_module(f"diffengine.commands.{command.replace('-', '_')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 2 for what the user can mend, 1 for a fault of ours."""
    try:
        options = parser().parse_args(argv)
        options.argv = list(sys.argv[1:] if argv is None else argv)
    except SystemExit as error:  # argparse: 2 for a mistake, 0 for --help
        return error.code if isinstance(error.code, int) else 2
    try:
        return _module(options.command).run(options)
    except UserError as error:
        print(f"diffengine {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"diffengine {options.command}: stopped at once", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except Exception as error:  # noqa: BLE001 - the last line of defence: say what broke in one line, and fail
        if os.environ.get("DIFFENGINE_TRACEBACK", "1") == "1":
            traceback.print_exc()
        print(f"diffengine {options.command}: failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def console() -> None:
    """The entry point of the installed command."""
    sys.exit(main())
