"""Files that a crash cannot break, and locks."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
