"""What a data set is: captioned images by index."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

from diffengine.datasets.missing import MissingImages
from diffengine.errors import UserError

# What travels from a data set to the batch: "image", "text" and what the transforms add.
Sample = dict[str, Any]
Size = tuple[int, int]  # (width, height) in pixels


class UnreadableImage(UserError):
    """An image that cannot be decoded. The message names the file or the row."""


class ImageDataset(ABC):
    """Captioned images by index. A subclass implements `__len__` and `__getitem__`; all else has defaults."""

    variations: int | None = None  # of each image, if the data set holds variations that were made before

    @abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """{"image": RGB PIL image, "text": str or list of str}; of a list one caption is drawn each time.

        "weight" is optional: a float above 0, default 1, by which the sample's tokens count in the loss.

        Raises:
            UnreadableImage: the image is damaged.
        """

    def __getitems__(self, indices: Sequence[int]) -> Iterable[Sample]:
        """The samples of many indices, read together if that is faster."""
        return (self[index] for index in indices)

    def captions(self, index: int) -> list[str]:
        """The captions of an image."""
        return as_list(self[index]["text"])

    def all_captions(self) -> Iterator[list[str]]:
        """The captions of each image in order; no image is read if the data set can avoid it."""
        return map(self.captions, range(len(self)))

    def size(self, index: int) -> Size | None:
        """(width, height) of an image in pixels, without decoding it; None if that is not known."""
        return None

    def files(self) -> list[Path] | None:
        """The files that hold the images' bytes, in order: a cache reads them to see what changed. None: unknown."""
        return None

    def missing_images(self) -> MissingImages | None:
        """Images to generate before training; None for a data set that never lacks any."""
        return None


@final
class WrappedDataset(ImageDataset):
    """Any object with `__len__` and `__getitem__` as an ImageDataset; or some of its items.

    Args:
        dataset: the object.
        indices: of the items; None for all.
        variations: of each image, if that is known.
    """

    def __init__(self, dataset: Any, indices: Sequence[int] | None = None, variations: int | None = None) -> None:
        self._dataset = dataset
        self._indices = range(len(dataset)) if indices is None else indices
        self.variations = variations

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._dataset[self._indices[index]]


def as_dataset(dataset: Any) -> ImageDataset:
    """`dataset` itself if it is an ImageDataset; any other object with a length and items is wrapped.

    Raises:
        UserError: it has no length or no items.
    """
    if isinstance(dataset, ImageDataset):
        return dataset
    kind = type(dataset)
    if not (hasattr(kind, "__len__") and hasattr(kind, "__getitem__")):
        raise UserError(
            f"dataset got a {kind.__name__}; expected a subclass of diffengine.datasets.ImageDataset, or an object "
            "with __len__ and __getitem__"
        )
    return WrappedDataset(dataset)


def as_list(text: str | list[str]) -> list[str]:
    """A sample's captions as a list: a sample has one or a list."""
    return [text] if isinstance(text, str) else list(text)
