"""What messages are made of: sizes, durations, rates, suggestions."""

import difflib
import re
import signal
import traceback
from collections.abc import Iterable

# What moves a terminal's cursor, turns the direction of writing, starts a line, or cannot be encoded.
CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
LONGEST_MESSAGE, LONGEST_VALUE = 2000, 200  # characters that are shown


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
    """A text as one line that a terminal shows and does not obey: control characters as "\\x1b"."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def can_be_written(text: str) -> bool:
    """Whether files and their names can hold a text: it is valid Unicode, without NUL."""
    return re.search("[\\0\\ud800-\\udfff]", text) is None


def shortened(text: str, most: int) -> str:
    """A text of at most `most` characters and an ellipsis, cut in the middle."""
    end = most // 4
    return text if len(text) <= most else f"{text[: most - end]} … {text[-end:]}"


def one_line(error: object) -> str:
    """The text of an error on one line, printable; its class name if it has no text."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - a class of a user's may raise anything
        text = ""
    return printable(shortened(text or type(error).__name__, LONGEST_MESSAGE))


def where(error: BaseException, file: str | None = None) -> str:
    """An error with its class, and the file and line that raised it: the last ones, or the last within `file`."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if file in (None, frame.filename)]
    line = f"line {frames[-1].lineno}: " if frames else ""
    line = line if file or not frames else f"{frames[-1].filename} {line}"
    text = one_line(error)
    name = type(error).__name__
    return f"{line}{name}" if text == name else f"{line}{name}: {text}"


def shown(value: object) -> str:
    """A value in a message: the start and the end of its `repr`."""
    try:
        return shortened(repr(value), LONGEST_VALUE)
    except Exception:  # noqa: BLE001 - as of `one_line`
        return f"a {type(value).__name__}"


def how_it_ended(code: int) -> str:
    """ "was killed by SIGKILL, perhaps for lack of memory" or "ended with exit code 3": a failed child process."""
    if code >= 0:
        return f"ended with exit code {code}"
    signum = signal.Signals(-code)
    likely = {signal.SIGKILL: ", perhaps for lack of memory", signal.SIGBUS: ", perhaps for lack of shared memory"}
    return f"was killed by {signum.name}{likely.get(signum, '')}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'word'?" for the known word nearest to `word`, or "" if none is near."""
    close = difflib.get_close_matches(word[:100], list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
