"""What messages are made of: sizes, durations, rates, suggestions."""

import difflib
import re
import signal
from collections.abc import Iterable

# What could drive a terminal or turn a line around: control characters but tab and newline, and bidi controls. And
# halves of characters, which cannot be printed.
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


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


def format_rate(per_second: float) -> str:
    """A rate as "0.925", "9.25", "105" or "1,050"."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def printable(text: str) -> str:
    """A text that may hold names and words of others, for a terminal or a log: what is not text is escaped."""
    return RAW.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(error: object) -> str:
    """The text of an error on one line; its class name if it has no text."""
    try:
        return printable(" ".join(str(error).split())) or type(error).__name__
    except Exception:  # noqa: BLE001 - of a user's class
        return type(error).__name__


def how_it_ended(code: int) -> str:
    """ "was killed by SIGKILL, perhaps for lack of memory" or "ended with exit code 3": a failed child process."""
    if code >= 0:
        return f"ended with exit code {code}"
    signum = signal.Signals(-code)
    likely = {signal.SIGKILL: ", perhaps for lack of memory", signal.SIGBUS: ", perhaps for lack of shared memory"}
    return f"was killed by {signum.name}{likely.get(signum, '')}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'word'?" for the known word nearest to `word`, or "" if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
