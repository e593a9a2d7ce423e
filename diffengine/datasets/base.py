"""What a data set is: captioned images by index."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from PIL.Image import Image

from diffengine.datasets.missing import MissingImages
from diffengine.errors import UserError, require

Sample = dict[str, Any]  # "image", "text" and what the transforms add
Size = tuple[int, int]  # (width, height) in pixels


class UnreadableImage(UserError):
    """An image that cannot be decoded. The message names the file or the row."""


@dataclass(frozen=True)
class Source:
    """Images of a data set that follow one another, and how training takes them.

    Attributes:
        name: in the log, in metrics and on the run's page.
        images: how many.
        repeats: how often an epoch takes each; "balance": so often that an epoch takes as many samples of this source
            as of the one that has the most.
        weight: of their loss, above 0.
        mirror: the probability with which they are mirrored; None for that of the transform `Flip`.
        path: where they come from.
    """

    name: str
    images: int
    repeats: int | Literal["balance"] = 1
    weight: float = 1.0
    mirror: float | None = None
    path: str = ""


class ImageDataset(ABC):
    """Captioned images by index. A subclass implements `__len__` and `__getitem__`; all else has defaults."""

    variations: int | None = None  # of each image, if the data set holds variations that were made before

    @abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """{"image": RGB PIL image, "text": str or list of str}; of a list one caption is drawn each time.

        "weight" is optional: a float above 0, default 1, by which the sample's tokens count in the loss. So is "mask",
        of a data set that `has_masks`: a PIL image of mode L and of the image's size, in which white is learnt.

        Raises:
            UnreadableImage: the image is damaged.
        """

    @property
    def sources(self) -> Sequence[Source]:
        """What the images are made up of, in their order."""
        return [Source("data", len(self))]

    def __getitems__(self, indices: Sequence[int]) -> Iterable[Sample]:
        """The samples of many indices, read together if that is faster."""
        return (self[index] for index in indices)

    def captions(self, index: int) -> list[str]:
        """The captions of an image."""
        return as_list(self[index]["text"])

    def all_captions(self) -> Iterator[list[str]]:
        """The captions of each image in order; no image is read if the data set can avoid it."""
        return map(self.captions, range(len(self)))

    def content(self, index: int) -> bytes | None:
        """What an image is known by when some are held out: equal for equal images. None: it is never held out.

        By default its pixels; bytes of a file are faster to get.
        """
        image = self[index].get("image")
        return None if image is None else repr(image.size).encode() + image.tobytes()

    def encoded(self, index: int) -> tuple[bytes | str, str] | None:
        """An image before it is decoded, as its bytes or its file, and what errors call it. None: it has no such thing.

        Raises:
            UnreadableImage: there is none in the data.
        """
        return None

    def encoded_mask(self, index: int) -> tuple[bytes | str, str] | None:
        """The mask of an image, as of `encoded`. None: the image has none."""
        return None

    def name(self, index: int) -> str:
        """What messages call an image: its file, if it has one."""
        return f"image {index}"

    def size(self, index: int) -> Size | None:
        """(width, height) of an image in pixels, without decoding it; None if that is not known."""
        return None

    def shapes(self) -> list[Size] | None:
        """(width, height) in pixels of each image, if the data set holds variations that were made for their shapes."""
        return None

    @property
    def has_masks(self) -> bool:
        """Whether samples may have a "mask"; in such data one without it counts whole."""
        return False

    def files(self) -> list[Path] | None:
        """The files that hold images and masks, in order: a cache reads them to see what changed. None: unknown."""
        return None

    def missing_images(self) -> list[MissingImages]:
        """Images to generate before training, by folder; none for a data set that never lacks any."""
        return []


@final
class WrappedDataset(ImageDataset):
    """Any object with `__len__` and `__getitem__` as an ImageDataset; with `indices`, only these of its items."""

    def __init__(self, dataset: Any, indices: Sequence[int] | None = None, variations: int | None = None) -> None:
        self._dataset = dataset
        self._indices = range(len(dataset)) if indices is None else indices
        self.variations = variations

    @property
    def has_masks(self) -> bool:
        return getattr(self._dataset, "has_masks", False)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._dataset[self._indices[index]]


def as_dataset(dataset: Any) -> ImageDataset:
    """`dataset` itself if it is an ImageDataset; any other object with a length and items is wrapped."""
    if isinstance(dataset, ImageDataset):
        return dataset
    cls = type(dataset)
    message = f"dataset got a {cls.__name__}; expected an ImageDataset, or an object with __len__ and __getitem__"
    require(hasattr(cls, "__len__") and hasattr(cls, "__getitem__"), message)
    return WrappedDataset(dataset)


def check_sample(sample: Any) -> Sample:
    """The sample that a data set gave; a UserError unless it is what `ImageDataset.__getitem__` says."""
    image, text = (sample.get(key) if isinstance(sample, dict) else None for key in ("image", "text"))
    texts = text if isinstance(text, list | tuple) else [text]
    if not (isinstance(image, Image) and len(texts) > 0 and all(isinstance(one, str) for one in texts)):
        got = {key: type(value).__name__ for key, value in sample.items()} if isinstance(sample, dict) else sample
        expected = "{'image': an RGB PIL image, 'text': str or list of str}"
        raise UserError(f"the data set gave {got!r:.200}; expected {expected}")
    return sample


def as_list(text: str | list[str]) -> list[str]:
    """A sample's captions as a list: a sample has one or a list."""
    return [text] if isinstance(text, str) else list(text)
