"""Images and captions in, batches out.

A data set of your own is a class with `__len__` and `__getitem__(index) -> {"image": PIL RGB, "text": str}`;
give it `captions()` if a vocabulary is to be learnt from it, `size(index)` for the survey,
`missing_images()` if the model is to draw some of its images before training, and, so that a cache can
tell what changed without reading images, `files()`, the files that hold their bytes, and `texts()`, the
caption or the list of captions of each. A sample may carry a `weight`, what each of its targets counts in the
loss: a float above 0, default 1.
"""

from diffengine.datasets.emoji import EmojiDataset
from diffengine.datasets.image_text import ImageTextDataset
from diffengine.datasets.images import Sample, UnreadableImage
from diffengine.datasets.stream import (
    Batch,
    Domain,
    PositionSampler,
    Stream,
    collate,
    form_loader,
    generator,
    make_loader,
    steps_for_epochs,
)
from diffengine.datasets.subject import MissingImages, SubjectDataset
from diffengine.datasets.survey import survey, survey_captions
from diffengine.datasets.transforms import Crop, DropCaption, Flip, Resize, ToTensor, Transform

__all__ = [
    "Batch",
    "Crop",
    "Domain",
    "DropCaption",
    "EmojiDataset",
    "Flip",
    "ImageTextDataset",
    "MissingImages",
    "PositionSampler",
    "Resize",
    "Sample",
    "Stream",
    "SubjectDataset",
    "ToTensor",
    "Transform",
    "UnreadableImage",
    "collate",
    "form_loader",
    "generator",
    "make_loader",
    "steps_for_epochs",
    "survey",
    "survey_captions",
]
