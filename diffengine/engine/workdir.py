"""The folder of a run.

config.py          what was trained, flags included; `diffengine train` reads it again
log.txt            what the console showed, with the time
metrics.jsonl      one line of numbers per log interval
previews/          what the model generated, by steps; before_after.png at the end
report.html        the run's page, from run.json (what it is doing), metrics.jsonl, previews/ and report/ (thumbnails)
tensorboard/
epoch_N.pth, iter_N.pth, best.pth
transformer/, ...  the trained components in diffusers' format, at the end
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from diffengine import distributed
from diffengine.config import Plain, to_text
from diffengine.engine import checkpoint
from diffengine.errors import UserError, require
from diffengine.files import locked, write_text
from diffengine.terminal import say

OURS = (checkpoint.BEST, "metrics.jsonl", "log.txt", "config.py", "before_after.png", "previews", "tensorboard",
        "run.json", "report.html", "report")  # fmt: skip
MARK = "as it was trained. Train it again: diffengine train config.py --work-dir DIR"


@contextmanager
def claimed(work_dir: Path, resume: str | None, overwrite: bool) -> Iterator[Path | None]:
    """Keep other processes out of a work dir while a run uses it, and yield the checkpoint to continue from, if any.

    Called on all ranks; rank 0 looks. Arguments as of `run.train`.
    """
    with ExitStack() as lock:
        yield distributed.on_rank_0(lambda: _claim(work_dir, resume, overwrite, lock))


def _claim(work_dir: Path, resume: str | None, overwrite: bool, lock: ExitStack) -> Path | None:
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        lock.enter_context(locked(work_dir))
        _refuse_foreign(work_dir, [*OURS, "model_index.json", *_models(work_dir)])
    except BlockingIOError as error:
        advice = "wait for it, or choose another --work-dir"
        raise UserError(f"another process is training in '{work_dir}'; {advice}") from error
    except OSError as error:
        raise UserError(f"cannot use work dir '{work_dir}': {error}") from error
    if resume is None:
        choices = "--resume continues it, --work-dir DIR keeps it and starts elsewhere, --overwrite deletes it"
        require(overwrite or not holds_run(work_dir), f"'{work_dir}' holds a run; {choices}")
        return None
    newest = checkpoint.newest(work_dir)
    if resume == "newest":
        if newest is None:
            say(f"'{work_dir}' has no checkpoint yet; starting from the beginning")
        return newest
    path = Path(resume)
    taken = checkpoint.steps(path)
    if newest and checkpoint.steps(newest) > taken:
        further = f"'{work_dir}' holds '{newest.name}', which is further than '{path}'"
        raise UserError(f"{further}; move it away, or continue in another folder with --work-dir")
    return path


def holds_run(work_dir: Path) -> bool:
    """Whether a run left something here that could be lost."""
    exports = _is_ours(work_dir) and _models(work_dir)
    return (work_dir / "metrics.jsonl").exists() or bool(checkpoint.paths(work_dir)) or bool(exports)


def _is_ours(work_dir: Path) -> bool:
    """Whether a run wrote the folder's `config.py`."""
    config = work_dir / "config.py"
    return config.is_file() and MARK in config.read_text(encoding="utf-8", errors="replace").partition("\n")[0]


def _models(work_dir: Path) -> list[str]:
    """Folders in it that hold a component or an adapter."""
    return sorted({path.parent.name for path in work_dir.glob("*/*config.json")})


def _refuse_foreign(work_dir: Path, names: Iterable[str]) -> None:
    """Refuse a folder in use for something else: a run would overwrite what it holds."""
    found = [name for name in names if (work_dir / name).exists()]
    if found and not _is_ours(work_dir):
        raise UserError(f"work dir '{work_dir}' holds '{found[0]}', which no run wrote; choose another --work-dir")


def begin(work_dir: Path, config: Plain, name: str, resumed: bool, components: Iterable[str]) -> None:
    """Write `config.py`; first delete what an overwritten run left, and only what a run writes.

    The run will export to `components`, names of folders. If `resumed`, what it has written so far stays.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    _refuse_foreign(work_dir, components)
    stale = list(work_dir.glob(".*.tmp"))
    if not resumed:
        stale += [work_dir / item for item in (*OURS, *components)] + checkpoint.paths(work_dir)
    for path in stale:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    write_text(work_dir / "config.py", to_text(config, f"{name}, {MARK}"))
