"""What happens around steps. To add a hook, subclass `Hook` and list the class in a config's `custom_hooks`."""

from diffengine.engine.hooks.checkpoint import CheckpointHook
from diffengine.engine.hooks.ema import EMAHook
from diffengine.engine.hooks.export import ExportHook
from diffengine.engine.hooks.metrics import MetricsHook
from diffengine.engine.hooks.preview import PreviewHook
from diffengine.engine.hooks.report import ReportHook
from diffengine.engine.hooks.validation import ValidationHook
from diffengine.engine.mmengine_seam import Hook

__all__ = [
    "CheckpointHook", "EMAHook", "ExportHook", "Hook", "MetricsHook", "PreviewHook", "ReportHook", "ValidationHook",
]  # fmt: skip
