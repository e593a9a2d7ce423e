"""The folder of a run.

config.py          what was trained, flags included; `diffengine train` reads it again
log.txt            what the console showed, with the time
metrics.jsonl      one line of numbers per log interval
previews/          what the model drew, by steps; before_after.png at the end
tensorboard/
epoch_N.pth, iter_N.pth
transformer/, ...  the trained components in diffusers' form, at the end
"""

import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffengine import distributed
from diffengine.config import to_text
from diffengine.engine import checkpoint
from diffengine.errors import UserError

OURS = ("metrics.jsonl", "log.txt", "config.py", "before_after.png", "previews", "tensorboard")
MARK = "as it was trained. Train it again: diffengine train config.py --work-dir DIR"


_locks: dict[Path, int] = {}  # the work dirs that this process trains in, by open folder


def holds_run(work_dir: Path) -> bool:
    """Whether a run has left something that could be lost here."""
    exports = _is_ours(work_dir) and _models(work_dir)
    return (work_dir / "metrics.jsonl").exists() or bool(checkpoint.paths(work_dir)) or bool(exports)


def _is_ours(work_dir: Path) -> bool:
    """Whether a run wrote the folder's `config.py`."""
    config = work_dir / "config.py"
    return config.is_file() and MARK in config.read_text(encoding="utf-8", errors="replace").partition("\n")[0]


def _models(work_dir: Path) -> list[str]:
    """Folders in it that hold a component or an adapter."""
    return sorted({path.parent.name for path in work_dir.glob("*/*config.json")})


def _lock(work_dir: Path) -> None:
    """Keep other processes out of the folder until `release`, or until this process ends.

    Raises:
        UserError: another process trains there.
    """
    place = work_dir.resolve()
    if place in _locks:
        return
    folder = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise UserError(
            f"another process is training in '{work_dir}'; wait for it, or choose another --work-dir"
        ) from error
    _locks[place] = folder


def release() -> None:
    """Let other processes train where this one did."""
    while _locks:
        os.close(_locks.popitem()[1])


def claim(work_dir: Path, resume: str | None, overwrite: bool) -> Path | None:
    """Look whether a run may use this folder; rank 0 looks, all hear.

    Args:
        resume: a checkpoint, "newest", or None to start anew.

    Returns:
        The checkpoint to go on from, or None.

    Raises:
        UserError: it holds a run and neither `resume` nor `overwrite` is asked for; it holds what no run
            wrote and a run would overwrite; or the folder cannot be used.
    """
    return distributed.on_rank_0(lambda: _claim(work_dir, resume, overwrite))


def _claim(work_dir: Path, resume: str | None, overwrite: bool) -> Path | None:
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        _lock(work_dir)
        _refuse_foreign(work_dir, [*OURS, "model_index.json", *_models(work_dir)])
    except OSError as error:
        raise UserError(f"cannot use work dir '{work_dir}': {error}") from error
    if resume is None:
        if holds_run(work_dir) and not overwrite:
            raise UserError(
                f"'{work_dir}' holds a run; --resume goes on with it, --work-dir DIR keeps it and starts "
                "elsewhere, --overwrite deletes it"
            )
        return None
    newest = checkpoint.newest(work_dir)
    if resume == "newest":
        if newest is None:
            print(f"'{work_dir}' has no checkpoint yet; starting from the beginning")
        return newest
    path = Path(resume)
    taken = checkpoint.steps(path)
    if newest and checkpoint.steps(newest) > taken:
        raise UserError(
            f"'{work_dir}' holds '{newest.name}', which is further than '{path}'; move it away, or go on in "
            "another folder with --work-dir"
        )
    return path


def _refuse_foreign(work_dir: Path, names: Iterable[str]) -> None:
    """A folder in use for something else is not a work dir: a run would overwrite what it holds.

    Raises:
        UserError: one of these is there, and no run wrote it.
    """
    found = [name for name in names if (work_dir / name).exists()]
    if found and not _is_ours(work_dir):
        raise UserError(
            f"work dir '{work_dir}' holds '{found[0]}', which no run wrote there; choose another --work-dir"
        )


def begin(work_dir: Path, settings: dict[str, Any], name: str, anew: bool, components: Iterable[str]) -> None:
    """Write `config.py`; before, delete what an overwritten run left, and only what a run makes.

    Args:
        components: names of the folders that the run will export to.

    Raises:
        UserError: one of these is there, and no run wrote it.
    """
    _refuse_foreign(work_dir, components)
    stale = list(work_dir.glob(".*.tmp"))
    if anew:
        stale += [work_dir / part for part in (*OURS, *components)] + checkpoint.paths(work_dir)
    for path in stale:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (work_dir / "config.py").write_text(to_text(settings, f"{name}, {MARK}"), encoding="utf-8")
