"""The one error that is meant for the user."""

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend: what was got, what was expected, what to do.

    The command line prints it as one line on stderr and exits with code 2; everything else that goes wrong is
    a bug of ours and exits with code 1.
    """


class Told(UserError):
    """A problem of another process, which prints it: this one ends with the same exit code and says nothing."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'word'?" for the nearest known word, or nothing where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


# What a disk refuses: room, or permission.
REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def disk_for_user() -> Iterator[None]:
    """A disk that is full or may not be written is the user's to mend, wherever it shows.

    Raises:
        UserError: in place of such an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        where = f"'{error.filename}'" if error.filename else "a file"
        raise UserError(
            f"cannot read or write {where}: {error.strerror}; make room or allow it there, or choose another folder"
        ) from error
