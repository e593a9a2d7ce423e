"""What messages are made of: sizes, durations, suggestions, progress."""

import difflib
import time
from collections.abc import Iterable


def format_bytes(size: float) -> str:
    """A size in bytes as "9.4 kB", "4.7 MB" or "7.30 GB"."""
    if 0 < size < 1e5:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e6:.1f} MB" if size < 1e8 else f"{size / 1e9:.2f} GB"


def format_duration(seconds: float) -> str:
    """A duration as "1:02:03", or "2:03" below an hour."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def one_line(error: object) -> str:
    """The text of an error on one line; its class name if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'word'?" for the known word nearest to `word`, or "" if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


class Progress:
    """Prints how much is done, how fast, and how long to go, at most every ten seconds.

    Args:
        total: how many things there are.
        done: such as "encoded".
        things: such as "images".
        steps: of each, if every step is reported.
    """

    def __init__(self, total: int, done: str, things: str, steps: float = 1) -> None:
        self.total, self.done, self.things, self.steps = total, done, things, steps
        self._count, self._began = 0, time.perf_counter()
        self._printed = self._began

    def skip(self, count: int) -> None:
        """Leave out what was done before."""
        self.total -= round(count / self.steps)

    def advance(self, count: int) -> None:
        """Count what was done since the last call, and print if it is time."""
        self._count += count
        now = time.perf_counter()
        if now - self._printed >= 10:
            self._printed, rate = now, self._count / self.steps / (now - self._began)
            finished = int(self._count / self.steps)
            left = format_duration((self.total - self._count / self.steps) / rate)
            print(f"{self.done} {finished:,}/{self.total:,} {self.things}, {rate:.3g}/s, {left} left", flush=True)
