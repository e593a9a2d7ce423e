"""The folder of a run.

diffengine.json    which names here are the run's: only these are replaced or deleted
config.py          what was trained, flags included; `diffengine train` reads it again
log.txt            what the console showed, with the time
metrics.jsonl      one line of numbers per log interval
previews/          what the model generated, by steps; before_after.png at the end
report.html        the run's page, from run.json (what it is doing), metrics.jsonl, previews/ and report/ (thumbnails)
tensorboard/
epoch_N.pth, iter_N.pth, best.pth
transformer/, ...  the trained components in diffusers' format, at the end
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffengine import distributed
from diffengine.config import Plain, to_text
from diffengine.engine import checkpoint
from diffengine.errors import UserError, require
from diffengine.files import OWNED, TRAINED, delete, expanded, is_inside, locked, own, owned, write_text
from diffengine.report.read import drop_damaged_lines
from diffengine.terminal import say

if TYPE_CHECKING:
    from diffengine.engine.build import Job

OURS = (checkpoint.BEST, "metrics.jsonl", "log.txt", "config.py", "before_after.png", "previews", "tensorboard",
        "run.json", "report.html", "report")  # fmt: skip
TITLE = f"{TRAINED} Train it again: diffengine train config.py --work-dir DIR"
INPUTS = ("train_dataloader", "model", "token_cache", "default_hooks", "custom_hooks")  # sections that name data


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
        _refuse_foreign(work_dir, [*OURS, OWNED, *([] if owned(work_dir) else _models(work_dir))])
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
    exports = owned(work_dir) - {*OURS, OWNED}
    names = [*(path.name for path in checkpoint.paths(work_dir)), "metrics.jsonl", *exports]
    return any(os.path.lexists(work_dir / name) for name in names)


def _models(work_dir: Path) -> list[str]:
    """What holds a component or an adapter, or says that the folder is a pipeline."""
    return ["model_index.json", *sorted({path.parent.name for path in work_dir.glob("*/*config.json")})]


def _refuse_foreign(work_dir: Path, names: Iterable[str]) -> None:
    """Refuse a folder in use for something else: a run would overwrite what it holds."""
    ours = owned(work_dir)
    found = [name for name in names if name not in ours and os.path.lexists(work_dir / name)]
    if found:
        advice = "move it away, or choose another --work-dir"
        raise UserError(f"work dir '{work_dir}' holds '{found[0]}', which no run wrote; {advice}")


def _refuse_pipes(work_dir: Path) -> None:
    """Refuse a folder where a file of ours is a pipe: to open it would wait for ever."""
    for name in sorted(owned(work_dir)):
        pipe = (work_dir / name).is_fifo()
        require(not pipe, f"'{work_dir / name}' is a pipe; expected a file: move it away")


def check_inputs(job: "Job") -> None:
    """Refuse a start that would delete what the run starts from or learns from."""
    stale = _stale(job.work_dir)
    given = [("--init-from", str(job.init_from))] if job.init_from else []
    for setting, path in given + [pair for name in INPUTS for pair in _texts(job.resolved.get(name), name)]:
        if not path or not is_inside(path, job.work_dir):
            continue
        folder = expanded(path)
        components = [*folder.iterdir()] if setting.startswith("model.") and folder.is_dir() else []
        if any(is_inside(read, item) for read in [folder, *components] for item in stale):
            lost = f"is of the run in '{job.work_dir}', which would be deleted"
            raise UserError(f"{setting} got '{path}', which {lost}; choose another --work-dir")


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """The texts in nested dicts, in dicts in lists and in lists of paths, by dotted name: a path may be among them."""
    if isinstance(value, str):
        yield name, value
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        if isinstance(value, dict) or isinstance(item, dict) or name.endswith(".path"):
            yield from _texts(item, f"{name}.{key}")


def _stale(work_dir: Path) -> list[Path]:
    """What a new run deletes: all that is an old run's. Checkpoints have names of their own."""
    return [*checkpoint.paths(work_dir), *(work_dir / name for name in sorted(owned(work_dir) - {OWNED}))]


def _temporary(work_dir: Path) -> list[Path]:
    """What a killed run left half written, under a temporary name of one of its files."""
    ours = owned(work_dir)

    def is_ours(name: str) -> bool:
        return name in ours or name[1:-4] in ours or bool(checkpoint.NAME.fullmatch(name[1:-4]))

    return [path for path in work_dir.glob(".*.tmp") if is_ours(path.name)]


def begin(work_dir: Path, config: Plain, name: str, resumed: bool, components: Iterable[str]) -> int:
    """Note what the run owns, delete what an old run left, and write `config.py`.

    The note comes first and stays, so a kill at any moment leaves a folder that `--overwrite` accepts.

    Args:
        resumed: what was written so far stays, apart from damaged lines of `metrics.jsonl`.
        components: names of the folders that the run will export to.

    Returns:
        How many lines were damaged.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    names, damaged = {*OURS, *components}, 0
    _refuse_foreign(work_dir, [*names, OWNED])
    if resumed:
        _refuse_pipes(work_dir)
    stale = [] if resumed else _stale(work_dir)
    own(work_dir, owned(work_dir) | names)
    for path in [*_temporary(work_dir), *stale]:
        delete(path)
    if resumed:
        damaged = drop_damaged_lines(work_dir / "metrics.jsonl")
    else:
        own(work_dir, names)
    write_text(work_dir / "config.py", to_text(config, f"{name}, {TITLE}"))
    return damaged
