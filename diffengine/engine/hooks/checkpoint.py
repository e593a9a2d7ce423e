"""Writing checkpoints while training."""

from typing import Any, final

import torch

from diffengine import distributed
from diffengine.engine import checkpoint, memory
from diffengine.engine.clock import Clock
from diffengine.engine.loop import Step
from diffengine.engine.mmengine_seam import Hook
from diffengine.engine.run import Run
from diffengine.engine.state import collect
from diffengine.errors import UserError, require
from diffengine.text import format_bytes


@final
class CheckpointHook(Hook):
    """Saves every `every` epochs or steps (the unit that the config counts), at the end, and when asked to stop.

    Args:
        every: None for the end only.
        keep: the newest to keep; None for all. The old one is deleted when the new one is complete.
    """

    priority = "VERY_LOW"

    def __init__(self, every: int | None = 1, keep: int | None = 3) -> None:
        for name, value in (("every", every), ("keep", keep)):
            require(value is None or value >= 1, f"checkpoint `{name}` got {value}; expected at least 1, or None")
        self.every, self.keep = every, keep
        self._saved_at: int | None = None

    def before_run(self, run: Run) -> None:
        """Refuse to start if the disk would fill up, before anything is generated."""
        run.checkpoints_kept = self.kept_at_once(run.clock)
        distributed.on_rank_0(lambda: checkpoint.check_disk(run.work_dir, expected_size(run), run.checkpoints_kept))

    def kept_at_once(self, clock: Clock) -> int:
        """The most checkpoints on disk at once: the old one is deleted after the new one is written."""
        written = clock.times_due(self.every)
        return written if self.keep is None else min(written, self.keep + 1)

    def after_step(self, run: Run, step: Step) -> None:
        if run.clock.due(self.every) or run.clock.finished:
            self.on_interrupt(run)

    def on_interrupt(self, run: Run) -> None:
        """Save this moment, unless it is saved."""
        if self._saved_at != run.clock.done:
            self._saved_at = run.clock.done
            state = collect(run)  # on every rank: hooks may gather
            distributed.on_rank_0(lambda: self._save(run, state))

    def _save(self, run: Run, state: dict[str, Any]) -> None:
        """Write a checkpoint and delete old ones; refuse weights that are not finite, which would replace good ones."""
        path, weights = run.work_dir / f"{run.clock.checkpoint_name}.pth", state["model"]
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in weights.values()]).tolist()  # one read
        broken = [name for name, whole in zip(weights, finite) if not whole]
        if broken:
            raise UserError(
                f"training diverged: {len(broken)} weights are not finite at step {run.clock.done} (first {broken[0]}) "
                f"and were not saved; lower the learning rate, and --resume from what is in '{run.work_dir}'"
            )
        checkpoint.write(path, state)
        checkpoint.prune(run.work_dir, self.keep)
        run.logger.info(f"saved {path} ({format_bytes(path.stat().st_size)})")


def expected_size(run: Run) -> int:
    """Bytes of one checkpoint before the first step: what is trained, an optimizer state of twice that, an average."""
    return 3 * memory.nbytes(run.trainable.trained_state().values()) + memory.nbytes(run.average.values())
