"""The `diffengine` command. A command's imports happen inside it, so `--help` is instant."""

import argparse
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from diffengine import __version__
from diffengine.errors import PeerError, UserError, check_text, disk_errors
from diffengine.text import one_line

COMMANDS = ("train", "check", "cache", "convert", "sample", "eval", "report", "list-cfg", "copy-cfg")


class Parser(argparse.ArgumentParser):
    """argparse that reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}; `{self.prog} --help` shows what it takes\n")


def parser() -> argparse.ArgumentParser:
    """The command line; each command's module describes the command and adds its own arguments."""
    top = Parser(prog="diffengine", description="Train aMUSEd, text-to-image by masked image modelling.")
    top.add_argument("--version", action="version", version=f"diffengine {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = _module(name)
        summary = (module.__doc__ or "").partition("\n\n")[0]
        module.arguments(commands.add_parser(name, help=summary, description=summary))
    return top


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"diffengine.commands.{command.replace('-', '_')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 2 for what the user can fix, 1 for a bug of ours."""
    argv, name = list(sys.argv[1:] if argv is None else argv), "diffengine"
    try:
        for word in argv:
            check_text(word, "the command line")
        options = parser().parse_args(argv)
        options.argv, name = argv, f"diffengine {options.command}"
        with disk_errors(), warnings.catch_warnings():
            if not sys.warnoptions:  # -W or PYTHONWARNINGS shows those of other packages
                warnings.filterwarnings("ignore", module=r"(?!diffengine)")
            return _module(options.command).run(options)
    except UserError as error:
        if not isinstance(error, PeerError):
            print(f"{name}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except SystemExit as error:  # argparse: 2 for a mistake, 0 for --help
        return error.code if isinstance(error.code, int) else 2
    except KeyboardInterrupt:
        print(f"{name}: stopped at once", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except Exception as error:  # noqa: BLE001 - the last line of defence: say what broke, and fail
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch's, on a CPU
            print(f"{name}: error: out of memory; try smaller images, batches or models", file=sys.stderr)
            return 2
        traceback.print_exc()
        print(f"{name}: failed: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        return 1


def console() -> None:
    """The entry point of the installed command."""
    # CPU threads that wait for one another spin for microseconds, then sleep: as fast on a free machine, up to five
    # times faster next to other work. OpenMP reads it once, when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    sys.exit(main())
