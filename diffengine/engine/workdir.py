"""The folder of a run.

    config.py          what was trained, flags included; `diffengine train` reads it again
    log.txt            what the console showed, with the time
    metrics.jsonl      one line of numbers per log interval
    previews/          what the model drew, by steps; before_after.png at the end
    tensorboard/
    epoch_N.pth, iter_N.pth
    transformer/, ...  the trained components in diffusers' form, at the end
"""

import shutil
from pathlib import Path
from typing import Any

from diffengine.config import to_text
from diffengine.engine import checkpoint, distributed
from diffengine.errors import UserError

OURS = ("metrics.jsonl", "log.txt", "config.py", "before_after.png", "previews", "tensorboard")


def holds_run(work_dir: Path) -> bool:
    """Whether a run has left something that could be lost here."""
    return (work_dir / "metrics.jsonl").exists() or any(work_dir.glob("*.pth"))


def claim(work_dir: Path, resume: str | None, overwrite: bool) -> Path | None:
    """Look whether a run may use this folder; rank 0 looks, all hear.

    Args:
        resume: a checkpoint, "newest", or None to start anew.

    Returns:
        The checkpoint to go on from, or None.

    Raises:
        UserError: it holds a run and neither `resume` nor `overwrite` is asked for, or the folder cannot be used.
    """
    answer = distributed.from_rank_0(_claim(work_dir, resume, overwrite) if distributed.rank() == 0 else None)
    assert answer is not None
    fault, path = answer
    if fault:
        raise UserError(fault)
    return path


def _claim(work_dir: Path, resume: str | None, overwrite: bool) -> tuple[str | None, Path | None]:
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        if resume is None:
            taken = holds_run(work_dir) and not overwrite
            return (
                f"'{work_dir}' holds a run; --resume goes on with it, --work-dir DIR keeps it and starts elsewhere, "
                "--overwrite deletes it" if taken else None
            ), None  # fmt: skip
        if resume != "newest":
            checkpoint.read(Path(resume))
            return None, Path(resume)
        path = checkpoint.newest(work_dir)
        if path is None:
            print(f"'{work_dir}' has no checkpoint yet; starting from the beginning")
        return None, path
    except OSError as error:
        return f"cannot use work dir '{work_dir}': {error}", None
    except UserError as error:
        return str(error), None


def begin(work_dir: Path, settings: dict[str, Any], name: str, anew: bool) -> None:
    """Delete what an overwritten run left (only what a run makes), and write `config.py`."""
    if anew:
        for path in [*(work_dir / part for part in OURS), *work_dir.glob("*.pth")]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    comment = f"{name}, as it was trained. Train it again: diffengine train config.py --work-dir DIR"
    (work_dir / "config.py").write_text(to_text(settings, comment), encoding="utf-8")
