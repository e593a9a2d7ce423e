"""Writing checkpoints while training."""

import math
from typing import Any, final

import torch

from diffengine import distributed
from diffengine.engine import build, checkpoint, memory
from diffengine.engine.clock import Clock
from diffengine.engine.mmengine_seam import Hook
from diffengine.engine.run import Run
from diffengine.engine.state import collect
from diffengine.engine.step import Step
from diffengine.errors import Diverged, require
from diffengine.text import format_bytes

HIGHER_IS_BETTER = ("val/accuracy", "val/caption_gain")


@final
class CheckpointHook(Hook):
    """Saves every `every` epochs or steps (the unit that the config counts), at the end, and when asked to stop.

    `best.pth` is the checkpoint with the best value of `best_by` so far, if the run validates.

    Args:
        every: None for the end only.
        keep: the newest to keep; None for all. The old one is deleted when the new one is complete, and not after a
            bad step: the weights of the new one may give nothing but bad steps.
        best_by: a metric of the validation; None: no `best.pth`.
    """

    priority = "VERY_LOW"

    def __init__(self, every: int | None = 1, keep: int | None = 3, best_by: str | None = "val/loss") -> None:
        for name, value in (("every", every), ("keep", keep)):
            require(value is None or value >= 1, f"checkpoint `{name}` got {value}; expected at least 1, or None")
        self.every, self.keep, self.best_by = every, keep, best_by
        self._saved_at: int | None = None
        self._best = math.inf

    def before_run(self, run: Run) -> None:
        """Refuse to start if the disk would fill up, before anything is generated."""
        self._bad = torch.tensor(False, device=run.job.device)  # whether the last step was bad
        run.checkpoints_kept = self.kept_at_once(run.clock, build.validates(run.hooks))
        distributed.on_rank_0(lambda: checkpoint.check_disk(run.work_dir, expected_size(run), run.checkpoints_kept))

    def kept_at_once(self, clock: Clock, validates: bool) -> int:
        """The most checkpoints on disk at once: the old one is deleted after the new one is written.

        Args:
            validates: whether the run has held-out images, and so a `best.pth`.
        """
        written = clock.times_due(self.every)
        best = int(validates and self.best_by is not None)
        return best + (written if self.keep is None else min(written, self.keep + 1))

    def before_train(self, run: Run) -> None:
        """Continue from the best value of the lines that a resumed run keeps."""
        name = self.best_by or ""
        lines = distributed.on_rank_0(lambda: run.metrics)
        values = [self._sign * line[name] for line in lines if line["iter"] and line.get(name) is not None]
        self._best = min(values, default=math.inf)

    def after_step(self, run: Run, step: Step) -> None:
        self._bad = step.bad
        validated_at, values = run.validation
        if self.best_by is not None and self.best_by in values and validated_at == run.clock.done:
            value = self._sign * values[self.best_by]
            if value < self._best:  # written first: a run that is killed after it validates this step again
                self._best, state = value, collect(run)
                distributed.on_rank_0(lambda: checkpoint.write(run.work_dir / checkpoint.BEST, state))
        if run.clock.due(self.every) or run.clock.finished:
            self.on_interrupt(run)

    @property
    def _sign(self) -> int:
        return -1 if self.best_by in HIGHER_IS_BETTER else 1

    def on_interrupt(self, run: Run) -> None:
        """Save this moment, unless it is saved."""
        if self._saved_at != run.clock.done:
            self._saved_at = run.clock.done
            state = collect(run)  # on every rank: hooks may gather
            distributed.on_rank_0(lambda: self._save(run, state))

    def _save(self, run: Run, state: dict[str, Any]) -> None:
        """Write a checkpoint and delete old ones; refuse weights that are not finite, which would replace good ones."""
        path, weights = run.work_dir / f"{run.clock.checkpoint_name}.pth", state["model"]
        finite = [torch.isfinite(tensor).all() for tensor in weights.values()]
        bad, *whole = torch.stack([self._bad, *finite]).tolist()  # one read
        broken = [name for name, is_whole in zip(weights, whole) if not is_whole]
        if broken:
            raise Diverged(
                f"training diverged: {len(broken)} weights are not finite at step {run.clock.done} (first {broken[0]}) "
                f"and were not saved; lower the learning rate, and --resume from what is in '{run.work_dir}'"
            )
        checkpoint.write(path, state)
        if not bad:
            checkpoint.prune(run.work_dir, self.keep)
        run.logger.info(f"saved {path} ({format_bytes(path.stat().st_size)})")


def expected_size(run: Run) -> int:
    """Bytes of one checkpoint before the first step: what is trained, an optimizer state of twice that, an average.

    With a schedule-free optimizer the weights are in it twice.
    """
    times = 4 if run.optim_wrapper.schedule_free else 3
    return times * memory.nbytes(run.trainable.trained_state().values()) + memory.nbytes(run.average.values())
