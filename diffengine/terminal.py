"""What a person reads: lines that are printed and logged, and a live line at the bottom of a terminal.

Names, prompts and errors come from anywhere, and a terminal obeys what it is sent. So all lines pass `printable` here.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from diffengine.text import format_duration, format_rate, printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live

REFRESH = 0.25  # seconds between two frames of a live line
SHORTEST_BAR, LONGEST_BAR = 3, 40  # columns
MARGIN = 2  # columns that stay free for the ^C that a terminal shows

Progressed = tuple[float, Sequence[str]]  # the share that is done, from 0 to 1, and numbers, the most important first


def say(*lines: str, file: TextIO | None = None) -> None:
    """Print lines, on `sys.stdout` unless `file` is given."""
    print("\n".join(map(printable, lines)), file=file, flush=True)


class LiveLine:
    """A line that is rewritten at the bottom of a terminal. What is printed meanwhile appears above it.

    Where there is no terminal, a plain line is written when there was none for a while.

    Args:
        describe: says how far it is; called when the live line is shown.
        write: writes a plain line.
        seconds: how long there must have been no plain line.
    """

    def __init__(self, describe: Callable[[], Progressed], write: Callable[[], None], seconds: float) -> None:
        self._describe, self._write, self._seconds = describe, write, seconds
        self._shown = time.perf_counter()
        self._live = self._open() if on_terminal() else None

    @property
    def live(self) -> bool:
        """Whether it is at the bottom of a terminal now."""
        return self._live is not None

    def tick(self) -> None:
        """Show how far it is, if it is time: to be called at every step."""
        now = time.perf_counter()
        if now - self._shown < (self._seconds if self._live is None else REFRESH):
            return
        self._shown = now
        if self._live is None:
            self._write()
            return
        try:
            self._live.refresh()
        except OSError:  # the terminal was closed, which is no reason to stop
            self.close()

    def wrote_line(self) -> None:
        """As `tick`, after another plain line that says how far it is."""
        if self._live is None:
            self._shown = time.perf_counter()
        else:
            self.tick()

    def close(self) -> None:
        """Show it for the last time, and give the terminal back."""
        live, self._live = self._live, None
        if live is not None:
            with suppress(OSError):
                live.stop()

    def _open(self) -> "Live":
        from rich.console import Console
        from rich.live import Live

        console = Console(
            file=sys.stdout, force_terminal=True, force_interactive=True, force_jupyter=False,
            markup=False, emoji=False, highlight=False, soft_wrap=True,  # other lines stay as they are
        )  # fmt: skip
        # No thread refreshes it: the loader's processes are forks, and would inherit the lock that it holds.
        live = Live(self, console=console, auto_refresh=False, redirect_stderr=sys.stderr.isatty())
        live.start(refresh=True)
        return live

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        done, numbers = self._describe()
        room = options.max_width - MARGIN
        text = Text(fitting(numbers, room), end="")
        text.highlight_regex("[a-z]+", "dim")
        bar = min(LONGEST_BAR, room - len(text) - 1)
        if bar >= SHORTEST_BAR:
            yield ProgressBar(total=1.0, completed=done, width=bar)
            yield Text(" ", end="")
        yield text


class Progress:
    """Shows how much is done, how fast, and how long to go: a live line, or a line every ten seconds.

    Args:
        total: how many things there are.
        done: such as "encoded".
        things: such as "images".
        steps: of each, if every step is reported.
    """

    def __init__(self, total: int, done: str, things: str, steps: float = 1) -> None:
        self.total, self.done, self.things, self.steps = total, done, things, steps
        self._count, self._began = 0, time.perf_counter()
        self._line: LiveLine | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    def skip(self, count: int) -> None:
        """Leave out what was done before."""
        self.total -= round(count / self.steps)

    def advance(self, count: int) -> None:
        """Count what was done since the last call, and show it if it is time."""
        self._count += count
        if self._line is None:
            self._line = LiveLine(self._describe, self._write, seconds=10)
        self._line.tick()

    def _write(self) -> None:
        say(", ".join(self._describe()[1]))

    def _describe(self) -> Progressed:
        finished = self._count / self.steps
        rate = finished / (time.perf_counter() - self._began)
        left = format_duration(max(0.0, self.total - finished) / rate)
        count = f"{self.done} {int(finished):,}/{self.total:,} {self.things}"
        return finished / max(self.total, finished), [count, f"{format_rate(rate)}/s", f"{left} left"]


class LineFormatter(logging.Formatter):
    """One line per record."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class ConsoleHandler(logging.StreamHandler):
    """Log lines on what `sys.stdout` is at the moment: a live line replaces it, to stay below them.

    A record with `printed=False` goes to other handlers only.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.addFilter(lambda record: getattr(record, "printed", True))

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    def handleError(self, record: logging.LogRecord) -> None:
        """A console that was closed is no reason to stop, nor for a traceback: the log has the line."""


def on_terminal() -> bool:
    """Whether a person sees what is printed, on a terminal where a line can be rewritten."""
    return sys.stdout.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def fitting(numbers: Sequence[str], columns: int) -> str:
    """As many of the numbers, the most important first, as fit into a line."""
    count = len(numbers)
    while count > 1 and len(" ".join(numbers[:count])) > columns:
        count -= 1
    return " ".join(numbers[:count])[: max(0, columns)]
