"""An average of the weights over training, which often generates better images than the last weights."""

from typing import final

import torch
from torch import Tensor

from diffengine.engine.mmengine_seam import Hook
from diffengine.engine.optim import trained_parameters
from diffengine.engine.run import Run
from diffengine.engine.step import Step
from diffengine.errors import require


@final
class EMAHook(Hook):
    """Keeps an exponential moving average of exactly the parameters that are trained, in fp32 on the device.

    After every step but bad ones `average = d * average + (1 - d) * weight`. With `warmup`, step number n (from 0) has
    d = min(decay, (1 + n) / (10 + n)), so the first weights are soon forgotten: the ramp of TensorFlow, diffusers and
    open-muse. (The latter two copy the weights at their first step, where this takes nine tenths.)

    The average starts from the weights that the run starts from, and previews use it. The checkpoint has it as `ema`:
    {"updates": steps averaged, "weights": by name}. The export at a run's end has the last step's weights;
    `diffengine convert --ema` writes the average. Resuming without `ema` starts a new average.

    Args:
        decay: in (0, 1); open-muse's pretraining has 0.9999, a short run needs less.
        warmup: ramp up, as above.
    """

    priority = "HIGH"  # before previews and checkpoints of the same step

    def __init__(self, decay: float = 0.9999, warmup: bool = True) -> None:
        require(0 < decay < 1, f"EMAHook got decay={decay}; expected a number between 0 and 1")
        self.decay, self.warmup = decay, warmup
        self.updates = torch.zeros((), dtype=torch.float64)  # on the device: only there is known which steps are bad

    def decay_at(self, update: Tensor) -> Tensor:
        """d of update number `update`, from 0; both are scalars in double precision."""
        return ((1 + update) / (10 + update)).clamp(max=self.decay) if self.warmup else 0 * update + self.decay

    def after_load_checkpoint(self, run: Run, checkpoint: dict) -> None:
        if "ema" in checkpoint:
            self.updates.fill_(checkpoint["ema"]["updates"])
            saved = checkpoint["ema"]["weights"]
            for name, parameter in trained_parameters(run.trainable).items():
                run.average[name] = torch.empty_like(parameter, dtype=torch.float32).copy_(saved[name])

    def before_run(self, run: Run) -> None:
        name = type(run.optim_wrapper.optimizer).__name__
        refused = f"EMAHook got the optimizer {name}, which averages the weights itself; leave one of the two out"
        require(not run.optim_wrapper.schedule_free, refused)
        if not run.average:
            trained = trained_parameters(run.trainable)
            run.average = {name: parameter.detach().float().clone() for name, parameter in trained.items()}
        self.updates = self.updates.to(run.job.device)

    @torch.no_grad()
    def after_step(self, run: Run, step: Step) -> None:
        live = [parameter.detach().float() for parameter in trained_parameters(run.trainable).values()]
        weight = torch.where(step.bad, 0, 1 - self.decay_at(self.updates)).float()
        torch._foreach_lerp_(list(run.average.values()), live, [weight] * len(live))
        self.updates += ~step.bad

    def after_train(self, run: Run) -> None:
        note = "previews show the average; what a run exports at its end are the weights of the last step"
        run.logger.info(f"{note}: diffengine convert {run.work_dir} --ema writes the average")

    def before_save_checkpoint(self, run: Run, checkpoint: dict) -> None:
        checkpoint["ema"] = {"updates": int(self.updates), "weights": dict(run.average)}
