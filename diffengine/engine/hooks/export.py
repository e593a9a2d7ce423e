"""The end of every run: its trained components in diffusers' form."""

from pathlib import Path
from typing import Any, final

from mmengine.hooks import Hook

from diffengine.engine import distributed
from diffengine.export import export_components


@final
class ExportHook(Hook):
    """Writes `WORK_DIR/<component>/` after the last step, as `diffengine convert` does."""

    priority = "LOWEST"

    def after_train(self, runner: Any) -> None:
        if distributed.rank() == 0:
            for path in export_components(runner.trainable, Path(runner.work_dir)):
                runner.logger.info(f"exported {path}")
        distributed.barrier()
