"""Checkpoint files: plain, atomic, found by steps.

    {"format", "name", "config"   the config as JSON text, with its references
     "folder"     where its relative paths start
     "model"      what training changes, by name
     "assets"     learnt text files
     "optimizer", "param_scheduler", "scaler"
     "counters"   {"iter": optimizer steps taken, "epoch": epochs completed}
     "num_samples"        images of the data set
     "micro_batch_size"   {"asked", "found"}, only if memory ran out
     "ema"        {"updates", "weights"}, of EMAHook
     "metrics"    the steps since the last line of metrics.jsonl, of MetricsHook
     ...}         what hooks add in `before_save_checkpoint`

`torch.load(weights_only=True)` accepts one, and reading it executes nothing. state.py collects and restores it.
"""

import pickle
import re
import shutil
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffengine.errors import UserError, require
from diffengine.files import atomic_write
from diffengine.text import format_bytes, one_line

FORMAT = "diffengine-1"
MOST = 2**20  # values in a checkpoint
# Of tensors; torch can do little with others, such as float8.
DTYPES = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bool,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
}  # fmt: skip
MOVE = "move it away, and use the one before"
BEST = "best.pth"  # of the validations so far
NAME = re.compile(r"(epoch|iter)_\d+\.pth")


def write(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint atomically; its tensors are streamed to the file without a copy in memory."""
    problems = _not_plain(checkpoint, "checkpoint")
    require(not problems, f"cannot write '{path}': {'; '.join(problems[:5])}; expected tensors and plain values")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(path) as temporary:
            torch.save(checkpoint, temporary)  # by name: through a Python file, torch would copy each tensor first
    except (OSError, RuntimeError) as error:
        free, reason = format_bytes(shutil.disk_usage(path.parent).free), str(error).partition("\n")[0]
        raise UserError(f"cannot write checkpoint '{path}' ({free} free): {reason}") from error


def _not_plain(value: Any, where: str) -> list[str]:
    """What `read` would refuse, and where. By exact type: np.float64 is a float, and a Parameter a tensor."""
    if type(value) in (dict, OrderedDict):
        keys = [problem for key in value for problem in _not_plain(key, f"a key of {where}")]
        return keys + [problem for key, item in value.items() for problem in _not_plain(item, f"{where}[{key!r}]")]
    if type(value) in (list, tuple):
        return [problem for index, item in enumerate(value) for problem in _not_plain(item, f"{where}[{index}]")]
    if value is None or type(value) in (bool, int, float, str, bytes) or _is_plain_tensor(value):
        return []
    odd = " that is not dense or holds no values, or has a gradient" if isinstance(value, Tensor) else ""
    return [f"{where} is of {type(value).__module__}.{type(value).__name__}{odd}"]


def _is_plain_tensor(value: Any) -> bool:
    """Whether a value is a tensor that others can be copied from: not sparse, quantized, meta, trained or odd."""
    if type(value) is not Tensor or value.layout is not torch.strided or value.dtype not in DTYPES:
        return False
    return not (value.is_quantized or value.is_meta or value.requires_grad)


def _size(value: Any, most: int) -> int:
    """How many values are nested in one, with repetitions; what exceeds `most` is not counted."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    count = 1
    for item in items:
        if count > most:
            break
        count += _size(item, most - count)
    return count


def read(path: Path) -> dict[str, Any]:
    """A checkpoint, memory-mapped: tensors are read when they are used.

    Raises:
        UserError: no such file, a broken or foreign one, or one that holds code or odd tensors.
    """
    require(path.is_file(), f"checkpoint '{path}' does not exist")
    foreign = f"'{path}' is no checkpoint of diffengine {FORMAT.rpartition('-')[2]}"
    try:
        with zipfile.ZipFile(path) as file:  # torch compresses nothing, so its entries have less than the file has
            entries = file.infolist()
            stored = all(item.compress_type == zipfile.ZIP_STORED for item in entries)
            require(stored and sum(item.file_size for item in entries) <= path.stat().st_size, foreign)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        ours = isinstance(checkpoint, dict) and checkpoint.get("format") == FORMAT
        require(ours and _size(checkpoint, MOST) <= MOST, foreign)
        odd = _not_plain(checkpoint, "checkpoint")
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        reason = "holds more than tensors and plain values, and was not read: it may run code"
        raise UserError(f"checkpoint '{path}' {reason}") from error
    except Exception as error:  # an unpickler of foreign bytes may raise anything
        size = path.stat().st_size
        raise UserError(f"checkpoint '{path}' is broken or cut off ({size} bytes); {MOVE}") from error
    require(not odd, f"checkpoint '{path}' is damaged or was changed: {'; '.join(odd[:5])}; {MOVE}")
    return checkpoint


def verify(path: Path) -> None:
    """Read a whole checkpoint and compare it with its checksums, which `read` does not."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except Exception as error:  # zipfile raises what damaged headers lead to, such as a UnicodeDecodeError of a name
        raise UserError(f"checkpoint '{path}' is broken or cut off ({one_line(error)})") from error
    require(not damaged, f"checkpoint '{path}' is damaged (in {damaged}); {MOVE}")


def paths(work_dir: Path) -> list[Path]:
    """The files of a work dir that are named as our checkpoints are, in no order."""
    return [path for path in work_dir.glob("*.pth") if NAME.fullmatch(path.name)]


def steps(path: Path) -> int:
    """The optimizer steps that a checkpoint stands for."""
    counters = read(path).get("counters")
    count = counters.get("iter") if isinstance(counters, dict) else None
    if type(count) is not int or count < 0:
        raise UserError(f"checkpoint '{path}' got counters {counters!r}; expected 'iter' of at least 0; {MOVE}")
    return count


def newest(work_dir: Path) -> Path | None:
    """The checkpoint that is furthest in training, or None.

    Raises:
        UserError: one is broken; it might be the newest, so no older one is used instead.
    """
    return max(paths(work_dir), key=steps, default=None)


def prune(work_dir: Path, keep: int | None) -> None:
    """Delete all but the `keep` newest checkpoints; None keeps all. Files that cannot be read are left alone."""
    if keep is None:
        return
    ours = []
    for path in paths(work_dir):
        with suppress(UserError):
            ours.append((steps(path), path))
    for _, path in sorted(ours)[:-keep]:
        path.unlink(missing_ok=True)


def check_disk(work_dir: Path, size: int, count: int) -> None:
    """Refuse a run if `count` checkpoints of at most `size` bytes, those already there included, would not fit."""
    needed = size * count - sum(path.stat().st_size for path in paths(work_dir))
    free = shutil.disk_usage(work_dir).free
    need = f"{count} checkpoints of {format_bytes(size)} need {format_bytes(needed)}"
    has = f"'{work_dir}' has {format_bytes(free)} free"
    require(needed <= free, f"{has}; {need}: keep fewer, or choose another --work-dir")
