"""The one error that is meant for the user."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: what was got, what was expected, what to do.

    The command line prints it as one line on stderr and exits with code 2; everything else that goes wrong is
    a fault of ours and exits with code 1.
    """


class Told(UserError):
    """A fault of another process, which prints it: this one ends with the same exit code and says nothing."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'word'?" for the nearest known word, or nothing where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
