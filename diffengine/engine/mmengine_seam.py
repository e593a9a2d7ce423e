"""Everything that touches mmengine: its Runner, hooks, loop, optimizer wrapper and visualizer backends.

mmengine provides the life cycle of a run, hooks with priorities, and the visualizer with its backends, so a hook
written for mmengine works here. What does not fit is replaced at the points that mmengine leaves open: process
start-up, logging, the layout of the work dir, wrapping, and `train`. Its resume and its loops are never called.
"""

import logging
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mmengine.hooks
import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook as AnyHook
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop
from mmengine.runner import Runner as MMRunner
from mmengine.visualization import BaseVisBackend, Visualizer
from torch import nn

from diffengine import distributed
from diffengine.terminal import ConsoleHandler, LineFormatter

if TYPE_CHECKING:
    from diffengine.engine.build import Job
    from diffengine.engine.run import Run
    from diffengine.engine.step import Step

__all__ = ["AnyHook", "BaseLoop", "BaseVisBackend", "Config", "Hook", "OptimWrapper", "Runner"]

# mmengine's default hooks read one value per step off the device, write in place, or step by epoch: all are off.
NO_DEFAULT_HOOKS = dict.fromkeys(("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint"))

# Hooks of mmengine that cannot work here, their subclasses too, and what to use instead.
REFUSED = {
    mmengine.hooks.DistSamplerSeedHook: "leave it out: the order of samples follows from the seed alone",
    mmengine.hooks.EMAHook: "use diffengine.engine.hooks.EMAHook",
    mmengine.hooks.EarlyStoppingHook: "leave it out: there is no validation loop of mmengine's that it could watch",
    mmengine.hooks.LoggerHook: "use diffengine.engine.hooks.MetricsHook",
    mmengine.hooks.RuntimeInfoHook: "use diffengine.engine.hooks.MetricsHook",
}


class Hook(AnyHook):
    """Base of our hooks: each method is called at its moment in the run, on every rank.

    `held_out_share` is the share of the images that the hook wants to hold out of training, for a run to see when it
    builds the data. Override what you need. mmengine's own names
    (`after_train_iter(runner, batch_idx, data_batch, outputs)`, ...) work as well, with a `Step` as `outputs`.
    """

    held_out_share: float | None = None

    def before_run(self, run: "Run") -> None:
        """Before anything is generated or trained: refuse what could not end well."""

    def before_train(self, run: "Run") -> None:
        """Before the first step."""

    def after_step(self, run: "Run", step: "Step") -> None:
        """After each optimizer step; `run.clock` counts it already."""

    def after_train(self, run: "Run") -> None:
        """After the last step."""

    def on_interrupt(self, run: "Run") -> None:
        """A signal asked the run to stop; the step is finished."""

    def on_error(self, run: "Run", error: BaseException) -> None:
        """The run ends with an error or, after `on_interrupt`, with Interrupted; other ranks may not get here."""

    def before_save_checkpoint(self, run: "Run", checkpoint: dict) -> None:
        """Add tensors and plain values to a checkpoint."""

    def after_load_checkpoint(self, run: "Run", checkpoint: dict) -> None:
        """Restore what `before_save_checkpoint` added."""

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.after_step(runner, outputs)


class Runner(MMRunner):
    """mmengine's Runner with its start-up, logging and training replaced. `model` is not yet wrapped in DDP."""

    def __init__(
        self, job: "Job", model: nn.Module, hooks: Sequence[AnyHook], backends: Sequence[BaseVisBackend]
    ) -> None:
        experiment = f"{job.name}-{time.time_ns()}"  # mmengine keeps loggers and hubs by name, for the process's life
        shown = list(backends) if distributed.rank() == 0 else None
        super().__init__(
            model=model,
            work_dir=str(job.work_dir),
            default_hooks=NO_DEFAULT_HOOKS,
            custom_hooks=list(hooks),
            visualizer=Visualizer.get_instance(experiment, vis_backends=shown, save_dir=str(job.work_dir)),
            randomness={"seed": job.resolved["seed"]},
            experiment_name=experiment,
            cfg=Config(job.config),
        )
        self.logger.setLevel(logging.INFO if self._rank == 0 else logging.ERROR)

    def setup_env(self, env_cfg: dict) -> None:
        """Note the numbers of the process group, which exists already (`distributed.start`)."""
        self._rank, self._world_size = distributed.rank(), distributed.world_size()
        self._distributed = self._world_size > 1
        self._timestamp = "."  # mmengine makes a folder of this name per start; our work dir is one folder

    def set_randomness(self, seed: int, *args: Any, **kwargs: Any) -> None:
        """Seed the global generators: nothing of ours draws from them, but a third party's hook may."""
        self._seed, self._deterministic = seed, False
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def build_logger(self, *args: Any, **kwargs: Any) -> logging.Logger:
        """Plain lines to the console and, with the time, to `log.txt`. Other ranks are silent."""
        logger = logging.getLogger("diffengine.run")
        close_logger(logger)
        logger.propagate = False
        logger.setLevel(logging.ERROR)  # silences mmengine's own lines during construction
        console = ConsoleHandler()
        console.setFormatter(LineFormatter("%(message)s"))
        logger.addHandler(console)
        if self._rank == 0:
            file = logging.FileHandler(Path(self.work_dir) / "log.txt", encoding="utf-8")
            file.handleError = _raise  # type: ignore[method-assign]  # logging's own prints a traceback for each line
            file.setFormatter(LineFormatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            logger.addHandler(file)
        return logger

    def _log_env(self, env_cfg: dict) -> None:
        """Do nothing: mmengine starts compilers to ask for their versions."""

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        return distributed.wrap(model)

    def dump_config(self) -> None:
        """Do nothing: `config.py` is written before anything else."""


def _raise(record: logging.LogRecord) -> None:
    raise  # the error being handled


def close_logger(logger: logging.Logger) -> None:
    """Close and remove a run's log handlers."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        with suppress(OSError):  # the disk of an earlier run may be full
            handler.close()
