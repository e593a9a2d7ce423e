"""The errors that are meant for the user, and the end of a run by a signal."""

import errno
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
OUT_OF_MEMORY = re.compile("DefaultCPUAllocator|out of memory|Storage size calculation overflowed")  # of torch


class UserError(Exception):
    """A mistake that the user can fix. Its message says what was given, what was expected and what to do.

    The command line prints it as one line on stderr and exits with code 2. Any other exception is a bug of ours: it
    ends in a traceback and exit code 1.
    """

    @property
    def lines(self) -> list[str]:
        """What is printed: one line."""
        return [str(self)]


class Mistakes(UserError):
    """Several at once, printed as a summary and a line for each; as text they are one line.

    Attributes:
        problems: a line for each.
    """

    def __init__(self, summary: str, problems: Sequence[str]) -> None:
        super().__init__(f"{summary}: {'; '.join(problems)}")
        self.summary, self.problems = summary, list(problems)

    @property
    def lines(self) -> list[str]:
        return [f"{self.summary}:", *(f"  {problem}" for problem in self.problems)]


class Diverged(UserError):
    """Training went wrong numerically: weights or losses are no longer finite."""


class PeerError(UserError):
    """A UserError of another rank, which reports it. This process exits with the same code and prints nothing."""


class Interrupted(Exception):
    """A signal asked a run to stop; the step was finished and saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def require(condition: bool, message: str) -> None:
    """Raise a UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn what the system refuses, a file or memory, into a UserError; any other exception passes through."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS and not error.filename:
            raise
        file = f"'{os.fsdecode(error.filename)}'" if error.filename else "a file"
        gone = "check that it was not deleted, moved or replaced, or choose another folder"
        advice = "free space or fix the permissions, or choose another folder" if error.errno in DISK_ERRORS else gone
        raise UserError(f"cannot read or write {file}: {error.strerror}; {advice}") from error
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(text):
            raise UserError(f"out of memory ({text or 'Python'}); choose smaller sizes, or a smaller batch") from error
        raise


@contextmanager
def quiet_threads() -> Iterator[None]:
    """Inside, a thread that ends with an OSError prints no traceback.

    TensorBoard's raises it again where something is written or closed.
    """
    before = threading.excepthook
    threading.excepthook = lambda given: None if issubclass(given.exc_type, OSError) else before(given)
    try:
        yield
    finally:
        threading.excepthook = before
