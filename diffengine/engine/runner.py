"""mmengine's Runner with our own parts in it.

mmengine gives the life cycle, the hooks with their priorities, and the visualizer with its backends, so that
a hook written for mmengine works here. What it does not serve for is replaced at the points that it leaves
open: process start-up, logging, the run dir's layout, wrapping, and `train`, which never calls its resume or
its loop.
"""

import logging
import random
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner as MMRunner
from mmengine.visualization import BaseVisBackend, Visualizer
from torch import nn

from diffengine import distributed
from diffengine.engine.loop import StepLoop
from diffengine.engine.optim import StepOptimWrapper
from diffengine.models.base import TrainableModel

# mmengine's default hooks read one value per step off the device, write in place, or step by epoch: all off.
NO_DEFAULT_HOOKS = dict.fromkeys(("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint"))


class LogFile(logging.FileHandler):
    """A log file that cannot be written is an error; logging's own would print a traceback for each line."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # the error it is called for


@final
class Runner(MMRunner):
    """One run of training.

    Attributes:
        trainable: the model behind any DDP wrapper.
        settings: the config as written, with references; what the run keeps.
        name: the config's name.

    Args:
        backends: where numbers and previews are shown; rank 0's are used.
        seed: of the run; what third parties draw from global generators starts from it.
    """

    trainable: TrainableModel
    param_scheduler: torch.optim.lr_scheduler.LRScheduler

    def __init__(
        self,
        model: TrainableModel,
        work_dir: Path,
        hooks: Sequence[Hook],
        backends: Sequence[BaseVisBackend],
        settings: dict[str, Any],
        name: str,
        seed: int,
    ) -> None:
        self.trainable = model
        self.settings = settings
        self.name = name
        experiment = f"{name}-{time.time_ns()}"  # mmengine keeps loggers and hubs by name, for the process's life
        super().__init__(
            model=model,
            work_dir=str(work_dir),
            default_hooks=NO_DEFAULT_HOOKS,
            custom_hooks=list(hooks),
            visualizer=Visualizer.get_instance(
                experiment,
                vis_backends=list(backends) if distributed.rank() == 0 else None,
                save_dir=str(work_dir),
            ),
            randomness={"seed": seed},
            experiment_name=experiment,
            cfg=Config(settings),
        )
        self.logger.setLevel(logging.INFO if self._rank == 0 else logging.ERROR)

    # -------------------------------------------------------------------------------------- mmengine's points

    def setup_env(self, env_cfg: dict) -> None:
        """The process group stands already (`distributed.start`); only its numbers are noted."""
        self._rank, self._world_size = distributed.rank(), distributed.world_size()
        self._distributed = self._world_size > 1
        self._timestamp = "."  # mmengine makes a folder of this name per start; our run dir is one folder

    def set_randomness(self, seed: int, *args: Any, **kwargs: Any) -> None:
        """Nothing of ours draws from global generators; a hook or an augmentation of someone else's may."""
        self._seed, self._deterministic = seed, False
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def build_logger(self, *args: Any, **kwargs: Any) -> logging.Logger:
        """Plain lines to the console and, with the time, to `log.txt`; other ranks are silent."""
        logger = logging.getLogger("diffengine.run")
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            with suppress(OSError):  # the disk of the run before may be full
                handler.close()
        logger.propagate = False
        logger.setLevel(logging.ERROR)  # mmengine's own lines; ours are let through once it stands
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(console)
        if self._rank == 0:
            file = LogFile(Path(self.work_dir) / "log.txt", encoding="utf-8")
            file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            logger.addHandler(file)
        return logger

    def _log_env(self, env_cfg: dict) -> None:
        """Nothing: mmengine starts compilers to ask for their versions."""

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        return distributed.wrap(model)

    def dump_config(self) -> None:
        """`config.py` is written with the run dir, before anything else."""

    def train(self) -> nn.Module:
        """Run the loop between `before_run` and `after_run`."""
        try:
            self.call_hook("before_run")
            self.train_loop.run()
            self.call_hook("after_run")
        finally:
            self.visualizer.close()
        return self.model

    # ------------------------------------------------------------------------------------------ ours

    def set_training(
        self,
        loop: StepLoop,
        optim_wrapper: StepOptimWrapper,
        param_scheduler: torch.optim.lr_scheduler.LRScheduler,
    ) -> None:
        """The parts that are built over the model."""
        loop.attach(self)
        self._train_loop = loop
        self.optim_wrapper = optim_wrapper
        self.param_scheduler = param_scheduler
