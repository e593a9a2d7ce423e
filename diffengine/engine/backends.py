"""Where numbers and previews are shown: visualizer backends that write what they get at the step they get it.

The `vis_backends` section lists them: `[dict(type=TensorboardBackend), dict(type=WandbBackend, project="pokemon")]`.
Both show scalars in groups, by `grouped`.
"""

import importlib.util
import re
from collections.abc import Mapping
from typing import Any, final

import numpy as np

from diffengine.config import to_text
from diffengine.engine.mmengine_seam import BaseVisBackend, Config
from diffengine.errors import require

GROUPS = {  # the first whose pattern is the whole name of a scalar
    "loss_by_t": r"loss_t\d+",
    "gradients": r"grad_norm.*",
    "speed": r".*_per_(second|step)|data_wait",
    "memory": r"memory_.*",
    "train": r".*",
}


def grouped(scalars: Mapping[str, Any]) -> dict[str, Any]:
    """Scalars as backends show them: "train/loss" for "loss"; "val/loss" and others with a group keep their names."""

    def named(name: str) -> str:
        return name if "/" in name else f"{next(key for key in GROUPS if re.fullmatch(GROUPS[key], name))}/{name}"

    return {named(name): value for name, value in scalars.items()}


@final
class TensorboardBackend(BaseVisBackend):
    """`WORK_DIR/tensorboard`, the config as text too.

    A resumed run replaces what was written beyond the step that it continues from.

    Args:
        save_dir: given by the run.
    """

    experiment: Any = None  # torch's SummaryWriter, once something is written

    def __init__(self, save_dir: str = ".") -> None:
        super().__init__(save_dir)
        self._config = ""

    def _init_env(self) -> None:
        """Do nothing: the first value opens the writer, since its step says what is replaced."""

    def _at(self, step: int) -> Any:
        if self.experiment is None:
            from torch.utils.tensorboard import SummaryWriter

            self.experiment = SummaryWriter(f"{self._save_dir}/tensorboard", purge_step=step)
            if self._config:
                self.experiment.add_text("config", self._config, step)
        return self.experiment

    def add_config(self, config: Config, **kwargs: Any) -> None:
        """Keep the config as Markdown until the writer is open."""
        self._config = f"```python\n{to_text(config.to_dict())}```"

    def add_image(self, name: str, image: np.ndarray, step: int = 0, **kwargs: Any) -> None:
        self._at(step).add_image(name, image, step, dataformats="HWC")

    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs: Any) -> None:
        self.add_scalars({name: value}, step)

    def add_scalars(self, scalar_dict: dict, step: int = 0, file_path: str | None = None, **kwargs: Any) -> None:
        for name, value in grouped(scalar_dict).items():
            self._at(step).add_scalar(name, value, step)
        self._at(step).flush()  # a run that is killed has shown what it logged

    def close(self) -> None:
        if self.experiment is not None:
            self.experiment.close()


@final
class WandbBackend(BaseVisBackend):
    """Weights & Biases. Unlike mmengine's, it passes the step on.

    Args:
        project, name: as in `wandb.init`.
        options: further arguments of `wandb.init`, such as `dict(mode="offline")`.
        save_dir: given by the run.

    Raises:
        UserError: the package is missing.
    """

    def __init__(
        self, project: str = "diffengine", name: str | None = None, options: dict | None = None, save_dir: str = "."
    ) -> None:
        found = importlib.util.find_spec("wandb") is not None
        require(found, "vis_backends got WandbBackend, but wandb is not installed: pip install 'diffengine[wandb]'")
        super().__init__(save_dir)
        self._options = {"project": project, "name": name, "dir": save_dir, **(options or {})}
        self._config: dict[str, Any] = {}
        self._run: Any = None

    def _init_env(self) -> None:
        import wandb

        if self._run is None:
            self._run = wandb.init(config=self._config, **self._options)

    @property
    def experiment(self) -> Any:
        """The wandb run."""
        self._init_env()
        return self._run

    def add_config(self, config: Config, **kwargs: Any) -> None:
        self._config = config.to_dict()

    def add_image(self, name: str, image: np.ndarray, step: int = 0, **kwargs: Any) -> None:
        import wandb

        self.experiment.log({name: wandb.Image(image)}, step=step)

    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs: Any) -> None:
        self.add_scalars({name: value}, step)

    def add_scalars(self, scalar_dict: dict, step: int = 0, file_path: str | None = None, **kwargs: Any) -> None:
        self.experiment.log(grouped(scalar_dict), step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
