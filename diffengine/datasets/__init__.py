"""Captioned images in, batches out.

To add a data set, subclass `ImageDataset` (base.py) in a module of your own and name it in a config. Any object with
`__len__` and `__getitem__(index) -> {"image": RGB PIL image, "text": str}` serves as well.
"""

from diffengine.datasets.base import ImageDataset, Sample, Source, UnreadableImage, WrappedDataset, as_dataset, as_list
from diffengine.datasets.emoji import EmojiDataset
from diffengine.datasets.image_text import ImageTextDataset
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
from diffengine.datasets.missing import MissingImages
from diffengine.datasets.shapes import Aspect, ByShape, Shapes
from diffengine.datasets.sources import Sources, SubjectDataset, open_dataset, paths_of, samples_of
from diffengine.datasets.split import Split, hold_out
from diffengine.datasets.stream import Stream, fixed_samples_of, generator, steps_for_epochs
from diffengine.datasets.survey import GOLDEN_RATIO, spread, survey, survey_captions
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

__all__ = [
    "GOLDEN_RATIO",
    "Aspect",
    "Batch",
    "ByShape",
    "Crop",
    "DropCaption",
    "EmojiDataset",
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
    "make_loader",
    "micro_batches",
    "open_dataset",
    "paths_of",
    "same_shape",
    "samples_of",
    "spread",
    "square_transforms",
    "steps_for_epochs",
    "survey",
    "survey_captions",
    "variation_batches",
]  # fmt: skip
