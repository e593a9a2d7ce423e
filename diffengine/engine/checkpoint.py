"""Checkpoints: plain, only what training changes, written beside and renamed.

    {"format", "name", "config"   the config as JSON text, references and all
     "model"      what training changes, by name
     "assets"     learnt text files
     "optimizer", "param_scheduler", "scaler"
     "counters"   {"iter": optimizer steps taken, "epoch": passes over the data completed}
     ...}         what hooks add in `before_save_checkpoint`

`torch.load(weights_only=True)` accepts it, and reading one executes nothing.
"""

import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch

from diffengine.errors import UserError

FORMAT = "diffengine-1"
_NAME = re.compile(r"(epoch|iter)_\d+\.pth")


def write(path: Path, checkpoint: dict[str, Any]) -> None:
    """Stream to a file beside `path`, flush it to disk, then rename: a crash leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            torch.save(checkpoint, file)
            _flush(file)
        beside.replace(path)
    except (OSError, RuntimeError) as error:
        beside.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise UserError(f"cannot write checkpoint '{path}' ({free / 1e9:.2f} GB free): {error}") from error


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def read(path: Path) -> dict[str, Any]:
    """A checkpoint, mapped into memory: tensors are read when they are used.

    Raises:
        UserError: no such file, a broken or foreign one, or one that holds code.
    """
    if not path.is_file():
        raise UserError(f"checkpoint '{path}' does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint '{path}' holds more than tensors and plain values, and was not read: it may run code"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint '{path}' is broken or cut off ({path.stat().st_size} bytes)") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"'{path}' is no checkpoint of diffengine {FORMAT.rpartition('-')[2]}")
    return checkpoint


def paths(work_dir: Path) -> list[Path]:
    """The checkpoints of a work dir, oldest first, by the steps they count. Broken ones are an error."""
    found = [path for path in work_dir.glob("*.pth") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: read(path)["counters"]["iter"])


def newest(work_dir: Path) -> Path | None:
    """The checkpoint that is furthest in training, or None."""
    found = paths(work_dir)
    return found[-1] if found else None


def prune(work_dir: Path, keep: int | None) -> None:
    """Delete all but the `keep` newest checkpoints; None keeps all."""
    if keep is not None:
        for path in paths(work_dir)[:-keep]:
            path.unlink()


def check_disk(work_dir: Path, size: int, count: int) -> None:
    """Refuse to start a run whose checkpoints would not fit.

    Args:
        size: bytes of one checkpoint.
        count: checkpoints on the disk at once, the one being written counted in.
    """
    free = shutil.disk_usage(work_dir).free
    if size * count > free:
        raise UserError(
            f"'{work_dir}' has {free / 1e9:.2f} GB free; {count} checkpoints of {size / 1e9:.2f} GB need "
            f"{size * count / 1e9:.2f} GB: keep fewer, or choose another --work-dir"
        )
