"""Files that a crash cannot break, which of a folder's files are ours, and locks."""

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
from diffengine.text import one_line

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
    try:
        names = json.loads((folder / OWNED).read_text(encoding="utf-8"))["owns"]
        return {OWNED, *(name for name in names if Path(name).name == name and name not in ("", ".."))}
    except (FileNotFoundError, NotADirectoryError):
        return _owned_before(folder)
    except (IsADirectoryError, ValueError, LookupError, TypeError):  # another program's
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


def read_text(file: Path, most: int = 2**30) -> str:
    """The UTF-8 text of a file, without a byte order mark.

    Raises:
        UserError: it is no file, but a pipe or a device; it has more than `most` bytes, or it is not UTF-8 text.
    """
    try:
        found = file.stat()
        require(stat.S_ISREG(found.st_mode), f"{file} is no file; expected a text file")
        require(found.st_size <= most, f"{file} has {found.st_size:,} bytes; expected at most {most:,}")
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    # Plain English in UTF-16 without a byte order mark is valid UTF-8, full of NUL.
    require("\0" not in text, f"{file} holds NUL characters, perhaps it is UTF-16; save it as UTF-8")
    return text


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of at most 64 MB; errors as of `read_text`, and if it holds something else."""
    try:
        found = json.loads(read_text(file, most=2**26))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {one_line(error)}") from error
    require(isinstance(found, dict), f"{file} holds no JSON object")
    return found


def expanded(name: str | Path) -> Path:
    """A path of the user's, "~" replaced."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"'{name}' names the home of a user that does not exist") from error


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether `path` is `folder` itself or lies inside it. Links are followed."""
    inner, outer = (expanded(item).resolve() for item in (path, folder))
    return inner.is_relative_to(outer)


def existing_parent(path: Path) -> Path:
    """The nearest folder that exists: `path` itself or one of its parents."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
