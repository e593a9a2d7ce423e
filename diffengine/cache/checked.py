"""A cache's files: written atomically, and used only if they are intact.

They are read with pread and not by a memory map: where a file was truncated in mid-run, a map ends the process by
SIGBUS.
"""

import errno
import hashlib
import json
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

import numpy as np
from xxhash import xxh3_64_hexdigest

from diffengine.errors import UserError
from diffengine.files import atomic_write

FORMAT = 2  # of a cache's files
NONE_YET = "there is none yet"
OTHER_VERSION = "was written by another version"
checksum = xxh3_64_hexdigest  # of bytes: 16 characters


def digest_of(value: Any) -> str:
    """A digest of plain values, by their JSON."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def unreadable(file: Path, why: str) -> UserError:
    """The error of a file that was damaged, or changed while it is used."""
    advice = "start again, with the images here, and it is repaired; or copy the cache again"
    return UserError(f"cannot read '{file}', damaged or changed since the start: {why}; {advice}")


@final
class OpenFile:
    """A file that is read at offsets, by forked workers too. A UserError says what cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():  # opening a pipe would wait
            raise unreadable(path, "no such file")
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise unreadable(path, str(error.strerror)) from error
        weakref.finalize(self, os.close, self._descriptor)

    @property
    def nbytes(self) -> int:
        """Its present size."""
        return os.fstat(self._descriptor).st_size

    def read(self, array: np.ndarray, offset: int) -> np.ndarray:
        """Fill a contiguous array from the file, and return it."""
        try:
            done = count = os.preadv(self._descriptor, [array], offset)  # type: ignore[list-item]
            while count and done < array.nbytes:  # the system may return less than was asked for
                rest = array.reshape(-1).view(np.uint8)[done:]
                count = os.preadv(self._descriptor, [rest], offset + done)  # type: ignore[list-item]
                done += count
        except OSError as error:
            raise unreadable(self.path, str(error.strerror)) from error
        if done < array.nbytes:
            raise unreadable(self.path, f"it ends before byte {offset + array.nbytes:,}")
        return array


def write(path: Path, content: Iterable[bytes]) -> None:
    """Write a file atomically. An empty folder at its path is removed.

    Raises:
        UserError: a folder at its path is not empty.
        OSError: it cannot be written; the error names the file.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            for some in content:
                file.write(some)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ENOTEMPTY):
            raise UserError(f"'{path}' is a folder; expected a file of the cache: move the folder away") from error
        error.filename = error.filename or str(path)  # a full disk names none
        raise


def write_json(path: Path, value: Any) -> None:
    """Write plain values with a digest of them and the file's name."""
    content = json.loads(json.dumps(value))  # as it will be read
    saved = {"format": FORMAT, "digest": digest_of([path.name, content]), "content": content}
    write(path, [json.dumps(saved, indent=1).encode()])


def read_json(path: Path) -> tuple[Any, str | None]:
    """What `write_json` wrote and None, or None and why it cannot be used."""
    if not path.exists():
        return None, NONE_YET
    try:
        saved = json.loads(path.read_text(encoding="utf-8") if path.is_file() else "")
        if isinstance(saved["format"], int) and saved["format"] != FORMAT:
            return None, f"'{path}' {OTHER_VERSION}"
        if saved["digest"] == digest_of([path.name, saved["content"]]):
            return saved["content"], None
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        pass  # damaged in one of many ways
    return None, f"'{path}' is damaged"
