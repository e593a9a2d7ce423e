"""Captioned images in, batches out.

To add a data set, subclass `ImageDataset` (base.py) in a module of your own and name it in a config. Any object with
`__len__` and `__getitem__(index) -> {"image": RGB PIL image, "text": str}` serves as well.
"""

import importlib
from typing import TYPE_CHECKING, Any

from diffengine.datasets.base import ImageDataset, Sample, Source, UnreadableImage, WrappedDataset, as_dataset, as_list
from diffengine.datasets.emoji import EmojiDataset
from diffengine.datasets.findings import GOLDEN_RATIO, Findings, spread
from diffengine.datasets.image_text import ImageTextDataset
from diffengine.datasets.inspect import inspect, is_encoded
from diffengine.datasets.missing import MissingImages
from diffengine.datasets.shapes import Aspect, ByShape, Shapes
from diffengine.datasets.sources import Sources, SubjectDataset, open_dataset, paths_of, samples_of
from diffengine.datasets.split import Split, hold_out
from diffengine.datasets.stream import Stream, fixed_samples_of, generator, steps_for_epochs
from diffengine.datasets.transforms import (
    Crop,
    DropCaption,
    Flip,
    Resize,
    ToTensor,
    Transform,
    VaryTags,
    center_crop,
    square_transforms,
)

if TYPE_CHECKING:  # it needs torch, without which images are looked at before a run
    from diffengine.datasets.loader import (
        Batch,
        PositionSampler,
        batches_of,
        collate,
        first_batch,
        make_loader,
        micro_batches,
        same_shape,
        variation_batches,
    )

__all__ = [
    "GOLDEN_RATIO",
    "Aspect",
    "Batch",
    "ByShape",
    "Crop",
    "DropCaption",
    "EmojiDataset",
    "Findings",
    "Flip",
    "ImageDataset",
    "ImageTextDataset",
    "MissingImages",
    "PositionSampler",
    "Resize",
    "Sample",
    "Shapes",
    "Source",
    "Sources",
    "Split",
    "Stream",
    "SubjectDataset",
    "ToTensor",
    "Transform",
    "UnreadableImage",
    "VaryTags",
    "WrappedDataset",
    "as_dataset",
    "as_list",
    "batches_of",
    "center_crop",
    "collate",
    "first_batch",
    "fixed_samples_of",
    "generator",
    "hold_out",
    "inspect",
    "is_encoded",
    "make_loader",
    "micro_batches",
    "open_dataset",
    "paths_of",
    "same_shape",
    "samples_of",
    "spread",
    "square_transforms",
    "steps_for_epochs",
    "variation_batches",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """A name of loader.py, imported on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'diffengine.datasets' has no attribute '{name}'")
    return getattr(importlib.import_module("diffengine.datasets.loader"), name)
