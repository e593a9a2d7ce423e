"""Writing checkpoints while training."""

from pathlib import Path
from typing import Any, final

import torch
from mmengine.hooks import Hook
from torch import Tensor

from diffengine import distributed
from diffengine.engine import checkpoint
from diffengine.engine.hooks.ema import EMAHook
from diffengine.engine.measure import kept_at_once, nbytes
from diffengine.engine.state import collect
from diffengine.errors import UserError
from diffengine.text import format_bytes


@final
class CheckpointHook(Hook):
    """Saves every `every` epochs or steps (the unit the config counts), at the end, and when asked to stop.

    Args:
        every: None for the end only.
        keep: the newest to keep; None for all. The old one goes when the new one is whole.
    """

    priority = "VERY_LOW"

    def __init__(self, every: int | None = 1, keep: int | None = 3) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value is not None and value < 1:
                raise UserError(f"checkpoint `{name}` got {value}; expected at least 1, or None")
        self.every = every
        self.keep = keep
        self._saved_at: int | None = None

    def before_run(self, runner: Any) -> None:
        """Refuse to start where the disk would fill up on the way, before anything is drawn."""
        most = kept_at_once(self.every, self.keep, runner.train_loop)
        distributed.on_rank_0(lambda: checkpoint.check_disk(Path(runner.work_dir), expected_size(runner), most))

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.train_loop.due(self.every) or runner.train_loop.done == runner.train_loop.max_iters:
            self.on_interrupt(runner)

    def on_interrupt(self, runner: Any) -> None:
        """Save this moment, unless it is saved."""
        if self._saved_at == runner.train_loop.done:
            return
        self._saved_at = runner.train_loop.done
        state = collect(runner)  # on every rank: hooks may gather
        distributed.on_rank_0(lambda: self._save(runner, state))

    def _save(self, runner: Any, state: dict[str, Any]) -> None:
        work_dir = Path(runner.work_dir)
        path = work_dir / f"{runner.train_loop.name}.pth"
        _refuse_diverged(state["model"], runner.train_loop.done, work_dir)
        checkpoint.write(path, state)
        checkpoint.prune(work_dir, self.keep)
        runner.logger.info(f"saved {path} ({format_bytes(path.stat().st_size)})")


def expected_size(runner: Any) -> int:
    """Bytes of one checkpoint: what is trained, an optimizer state of twice that, perhaps an average."""
    trained = nbytes(runner.trainable.trained_state().values())
    return trained * (4 if any(isinstance(hook, EMAHook) for hook in runner.hooks) else 3)


def _refuse_diverged(model: dict[str, Tensor], step: int, work_dir: Path) -> None:
    """Weights that are not finite are not saved over good ones. One read of the device."""
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in model.values()]).tolist()
    broken = [name for name, whole in zip(model, finite) if not whole]
    if broken:
        raise UserError(
            f"training diverged: {len(broken)} weights are not finite at step {step} (first {broken[0]}) "
            f"and were not saved; lower the learning rate, and --resume from what is in '{work_dir}'"
        )
