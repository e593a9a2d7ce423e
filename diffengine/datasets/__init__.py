"""Pictures and captions in, batches out.

A data set of your own is a class with `__len__` and `__getitem__(index) -> {"image": PIL RGB, "text": str}`;
give it `captions()` if a vocabulary is to be learnt from it, and `size(index)` for the survey.
"""

from diffengine.datasets.emoji import EmojiDataset
from diffengine.datasets.image_text import ImageTextDataset
from diffengine.datasets.pictures import Sample, UnreadablePicture
from diffengine.datasets.stream import (
    Batch,
    Domain,
    PositionSampler,
    Stream,
    collate,
    generator,
    make_loader,
    split,
    steps_for_epochs,
)
from diffengine.datasets.survey import survey
from diffengine.datasets.transforms import Crop, DropCaption, Flip, Resize, ToTensor, Transform

__all__ = [
    "Batch",
    "Crop",
    "Domain",
    "DropCaption",
    "EmojiDataset",
    "Flip",
    "ImageTextDataset",
    "PositionSampler",
    "Resize",
    "Sample",
    "Stream",
    "ToTensor",
    "Transform",
    "UnreadablePicture",
    "collate",
    "generator",
    "make_loader",
    "split",
    "steps_for_epochs",
    "survey",
]
