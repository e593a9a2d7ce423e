"""The end of every run: its trained components in diffusers' form."""

from pathlib import Path
from typing import Any, final

from mmengine.hooks import Hook

from diffengine import distributed
from diffengine.export import Exported, check_targets, export_components


@final
class ExportHook(Hook):
    """Writes `WORK_DIR/<component>/` after the last step, as `diffengine convert` does."""

    priority = "LOWEST"

    def before_run(self, runner: Any) -> None:
        """Refuse a work dir that the export at the end could not write to."""
        folders = [Path(runner.work_dir) / name for name in runner.trainable.exportable]
        distributed.on_rank_0(lambda: check_targets(runner.trainable, folders))

    def after_train(self, runner: Any) -> None:
        for folder in distributed.on_rank_0(lambda: _export(runner)):
            runner.logger.info(f"exported {folder}")


def _export(runner: Any) -> list[Exported]:
    with runner.trainable.full_precision():
        return export_components(runner.trainable, Path(runner.work_dir))
