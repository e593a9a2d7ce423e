"""An average of the weights over training, which often draws better than the last ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from mmengine.hooks import Hook
from torch import Tensor, nn

from diffengine.errors import UserError


@final
class EMAHook(Hook):
    """Keeps an exponential moving average of exactly the parameters that are trained, in fp32 on the device.

    After every step `average = d * average + (1 - d) * weight`. With `warmup`, step number n (from 0) has
    d = min(decay, (1 + n) / (10 + n)), so that the weights of the beginning are soon forgotten: the ramp of
    TensorFlow's `ExponentialMovingAverage(num_updates)`, which `diffusers.training_utils.EMAModel` and
    open-muse's `EMAModel` took over. (Both of them copy the weights at their first step, where this takes
    nine tenths.)

    The average starts from the weights that the run starts from. Previews draw with it. It is in the
    checkpoint as `ema`: {"updates": steps averaged, "weights": by name}. The export at a run's end has the
    weights of the last step; `diffengine convert --ema` writes the average. A resumed run goes on with it
    exactly; one whose checkpoint has none starts an average there.

    Args:
        decay: in (0, 1); open-muse's pretraining has 0.9999, a short run wants less.
        warmup: ramp up, as above.
    """

    priority = "HIGH"  # before previews and checkpoints of the same step

    def __init__(self, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 < decay < 1:
            raise UserError(f"EMAHook got decay={decay}; expected a number between 0 and 1")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.weights: dict[str, Tensor] = {}

    def decay_at(self, update: int) -> float:
        """d of update number `update`, from 0."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if "ema" not in checkpoint:
            return
        trained = trained_parameters(runner.trainable)
        saved = checkpoint["ema"]["weights"]
        assert saved.keys() == trained.keys()  # as the checkpoint's own weights, which fitted
        self.updates = checkpoint["ema"]["updates"]
        self.weights = {
            name: torch.empty_like(parameter, dtype=torch.float32).copy_(saved[name])
            for name, parameter in trained.items()
        }

    def before_train(self, runner: Any) -> None:
        if not self.weights:
            trained = trained_parameters(runner.trainable)
            self.weights = {name: item.detach().float().clone() for name, item in trained.items()}

    @torch.no_grad()
    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        live = [parameter.detach().float() for parameter in trained_parameters(runner.trainable).values()]
        torch._foreach_lerp_(list(self.weights.values()), live, 1 - self.decay_at(self.updates))
        self.updates += 1

    def after_train(self, runner: Any) -> None:
        runner.logger.info(
            "previews show the average; what a run exports at its end are the weights of the last step: "
            f"diffengine convert {runner.work_dir} --ema writes the average"
        )

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint["ema"] = {"updates": self.updates, "weights": dict(self.weights)}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name: `trained_state` without buffers."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def averaged_weights(runner: Any) -> Iterator[None]:
    """Inside, the model has the average in place of its weights, if the run keeps one; nothing is copied."""
    average = next((hook.weights for hook in runner.hooks if isinstance(hook, EMAHook)), {})
    trained = trained_parameters(runner.trainable)
    live = {name: trained[name].data for name in average}
    try:
        for name, weight in average.items():
            trained[name].data = weight.to(live[name].dtype)
        yield
    finally:
        for name, weight in live.items():
            trained[name].data = weight
