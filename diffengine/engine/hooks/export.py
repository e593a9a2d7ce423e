"""The end of every run: its trained components in diffusers' form."""

from pathlib import Path
from typing import Any, final

from mmengine.hooks import Hook

from diffengine.engine import distributed
from diffengine.export import check_targets, export_components


@final
class ExportHook(Hook):
    """Writes `WORK_DIR/<component>/` after the last step, as `diffengine convert` does."""

    priority = "LOWEST"

    def before_train(self, runner: Any) -> None:
        """Refuse a work dir that the export at the end could not write to."""
        folders = [Path(runner.work_dir) / name for name in runner.trainable.exportable]
        distributed.on_rank_0(lambda: check_targets(runner.trainable, folders))

    def after_train(self, runner: Any) -> None:
        folders = distributed.on_rank_0(lambda: export_components(runner.trainable, Path(runner.work_dir)))
        for folder in folders:
            runner.logger.info(f"exported {folder}")
