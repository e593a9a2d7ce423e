"""Files that a crash cannot break, which of a folder's files are ours, foreign files, and locks."""

import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffengine.errors import UserError, require
from diffengine.text import format_bytes, one_line

LARGEST_JSON = 2**26  # bytes of a foreign JSON file; a tokenizer of 256,000 tokens has 34 MB

OWNED = "diffengine.json"  # in a folder that we write to: the names there that are ours

# What a run or `convert` may have written into a work dir before there was such a file.
OWNED_BEFORE = {
    "config.py", "log.txt", "metrics.jsonl", "run.json", "report.html", "report", "previews", "before_after.png",
    "tensorboard", "best.pth", "transformer", "text_encoder", "vqvae", "tokenizer", "scheduler", "model_index.json",
}  # fmt: skip
TRAINED, EXPORTED = "as it was trained.", '"_diffengine_version"'  # in config.py's first line; in model_index.json


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file next to `path`; when the block succeeds, flush it to disk and rename it to `path`.

    After a crash `path` is either the old file or the new one, never half of one.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if not temporary.is_char_device():  # what a kill left; or a link, and we would write to where it leads
            temporary.unlink(missing_ok=True)
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


def owned(folder: Path) -> set[str]:
    """The names in a folder that are ours: they may be replaced and deleted, and no others."""
    if not os.path.lexists(folder / OWNED):
        return _owned_before(folder)
    try:
        names = read_json(folder / OWNED)["owns"]
        return {OWNED, *(name for name in names if Path(name).name == name and name not in ("", ".."))}
    except (UserError, LookupError, TypeError):  # another program's
        return set()


def _owned_before(folder: Path) -> set[str]:
    """What is ours in a folder without `OWNED`, which an older version may have written."""
    config, index = folder / "config.py", folder / "model_index.json"
    if config.is_file() and TRAINED in config.read_text(encoding="utf-8", errors="replace").partition("\n")[0]:
        return OWNED_BEFORE
    text = index.read_text(encoding="utf-8", errors="replace") if index.is_file() else ""
    return {index.name, *(name for name in OWNED_BEFORE if f'"{name}":' in text)} if EXPORTED in text else set()


def own(folder: Path, names: Iterable[str]) -> None:
    """Note, before they are written, all the names in a folder that are ours; without any, delete the note."""
    if listed := sorted({*names} - {OWNED}):
        write_text(folder / OWNED, json.dumps({"owns": listed}, indent=1) + "\n")
    else:
        delete(folder / OWNED)


def delete(path: Path) -> None:
    """Delete a file, a folder or a link, but never what a link points to. It may be missing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe is not waited for
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def expanded(name: str | Path) -> Path:
    """A path of the user's, "~" replaced."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"'{name}' names the home of a user that does not exist") from error


def real_path(name: str | Path) -> Path:
    """A path of the user's without links; one that leads in a circle stays."""
    return Path(os.path.realpath(expanded(name)))


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether `path` is `folder` itself or lies inside it. Links are followed."""
    return real_path(path).is_relative_to(real_path(folder))


def existing_parent(path: Path) -> Path:
    """The nearest folder that exists: `path` itself or one of its parents."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
