"""What happens around steps: numbers, checkpoints, images, export.

A hook is mmengine's: `before_train(runner)`, `after_train_iter(runner, batch_idx, data_batch, outputs)`, ...
Here `outputs` is a `loop.Step`, and `runner.train_loop.due(every)` answers in the unit that the config
counts.
"""

from diffengine.engine.hooks.checkpoint import CheckpointHook
from diffengine.engine.hooks.ema import EMAHook
from diffengine.engine.hooks.export import ExportHook
from diffengine.engine.hooks.metrics import MetricsHook
from diffengine.engine.hooks.preview import PreviewHook

__all__ = ["CheckpointHook", "EMAHook", "ExportHook", "MetricsHook", "PreviewHook"]
