"""The end of every run: its trained components in diffusers' format."""

from typing import final

from diffengine import distributed
from diffengine.engine.mmengine_seam import Hook
from diffengine.engine.run import Run
from diffengine.export import Exported, check_targets, export_components


@final
class ExportHook(Hook):
    """Writes `WORK_DIR/<component>/` after the last step, as `diffengine convert` does."""

    priority = "LOWEST"

    def before_run(self, run: Run) -> None:
        """Refuse a work dir that the export at the end could not write to."""
        folders = [run.work_dir / name for name in run.trainable.exportable]
        distributed.on_rank_0(lambda: check_targets(run.trainable, folders))

    def after_train(self, run: Run) -> None:
        def export() -> list[Exported]:
            with run.optim_wrapper.eval_weights(), run.trainable.full_precision():
                return export_components(run.trainable, run.work_dir)

        for folder in distributed.on_rank_0(export):
            run.logger.info(f"exported {folder}")
