"""The `diffengine` command. A command's imports happen inside it, so `--help` is instant."""

import argparse
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from diffengine import __version__
from diffengine.errors import PeerError, UserError, disk_errors, require
from diffengine.terminal import say
from diffengine.text import can_be_written, one_line, printable, shown

COMMANDS = ("data", "train", "check", "cache", "convert", "sample", "eval", "report", "list-cfg", "copy-cfg")
LONGEST = 100_000  # characters of an argument


class Parser(argparse.ArgumentParser):
    """argparse that reports a mistake in one line, and takes an option by its whole name only."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: error: {one_line(message)}; `{self.prog} --help` shows what it takes", file=sys.stderr)
        self.exit(2)


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
    name, argv = "diffengine", list(sys.argv[1:] if argv is None else argv)
    try:
        _check(argv)
        options = parser().parse_args(argv)
        options.argv = argv
        name = f"diffengine {options.command}"
        with disk_errors():
            return _module(options.command).run(options)
    except SystemExit as error:  # argparse: 2 for a mistake, 0 for --help
        return error.code if isinstance(error.code, int) else 2
    except UserError as error:
        if not isinstance(error, PeerError):
            first, *more = error.lines
            say(f"{name}: error: {one_line(first)}", *map(printable, more), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say(f"{name}: stopped at once", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except Exception as error:  # noqa: BLE001 - the last line of defence: say what broke, and fail
        traceback.print_exc()
        say(f"{name}: failed: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        return 1


def _check(argv: Sequence[str]) -> None:
    """Refuse arguments that no file, no config and no prompt can hold."""
    for text in argv:
        fine = can_be_written(text) and len(text) <= LONGEST
        require(
            fine, f"got the argument {shown(text)}; expected UTF-8 text without NUL, {LONGEST:,} characters at most"
        )


def quiet_libraries() -> None:
    """Keep the libraries' warnings out of our lines, unless the environment or `python -W` asks for them."""
    for name in ("DATASETS", "DIFFUSERS", "HF_HUB", "TRANSFORMERS"):
        os.environ.setdefault(f"{name}_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.warnoptions:  # set by -W and PYTHONWARNINGS
        warnings.simplefilter("ignore")
        logging.getLogger().addHandler(logging.NullHandler())  # else logging prints warnings that nobody listens to


def open_streams() -> None:
    """Let stdout and stderr take any line: also if they are closed, or cannot encode it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - it stays open
        getattr(sys, name).reconfigure(errors="backslashreplace")


def console() -> None:
    """The entry point of the installed command."""
    open_streams()
    quiet_libraries()
    # CPU threads that wait for one another spin for microseconds, then sleep: as fast on a free machine, up to five
    # times faster next to other work. OpenMP reads it once, when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    sys.exit(main())
