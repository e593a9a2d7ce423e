"""Files that a crash cannot break, foreign files that are checked before they are read, and locks."""

import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffengine.errors import UserError, require
from diffengine.text import format_bytes, one_line

LARGEST_JSON = 2**26  # bytes of a foreign JSON file; a tokenizer of 256,000 tokens has 34 MB


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file next to `path`; when the block succeeds, flush it to disk and rename it to `path`.

    After a crash `path` is either the old file or the new one, never half of one.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_regular(path: str | Path) -> os.stat_result:
    """The status of a regular file, or an OSError: a FIFO would be waited for, and a device need not end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return status


def read_foreign(path: Path, most: int) -> bytes:
    """The bytes of a file from anywhere; a UserError unless it is a regular file of at most `most` bytes."""
    try:
        size = check_regular(path).st_size
        require(size <= most, f"'{path}' has {format_bytes(size)}; expected at most {format_bytes(most)}")
        with path.open("rb") as file:
            return file.read(most)
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise UserError(f"'{path}' cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file from anywhere; a UserError if it holds anything else."""
    content = read_foreign(path, LARGEST_JSON)
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not JSON: {one_line(error)}; get the file again") from error
    require(isinstance(found, dict), f"'{path}' holds a JSON {type(found).__name__}; expected an object")
    return found


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on an existing file or folder until the block ends or the process dies.

    If another process holds it: wait, or raise a BlockingIOError.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether `path` is `folder` itself or lies inside it. Links are followed."""
    inner, outer = (Path(item).expanduser().resolve() for item in (path, folder))
    return inner.is_relative_to(outer)


def existing_parent(path: Path) -> Path:
    """The nearest folder that exists: `path` itself or one of its parents."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
