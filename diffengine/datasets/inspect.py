"""Looking at a data set before anything is trained on it.

It runs at each start, before torch is imported where that is possible, and behind `diffengine data`.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import numpy as np
from PIL import Image

from diffengine.datasets.base import ImageDataset, Sample, UnreadableImage
from diffengine.datasets.findings import GOLDEN_RATIO, Findings, ImageFacts, Lengths, evenly
from diffengine.datasets.folder import Problems, UnusableData
from diffengine.datasets.images import check_mask_size, ends_early, faded, read_image, read_mask, read_size, read_small
from diffengine.datasets.shapes import MAX_ASPECT, MULTIPLES, Shapes
from diffengine.datasets.sources import open_dataset, paths_of
from diffengine.errors import UserError
from diffengine.files import expanded
from diffengine.registry import build
from diffengine.signatures import problems_of
from diffengine.terminal import Progress, say

SHORT = 1.0  # seconds after which it is shown how far decoding is
SECONDS = 5.0  # that a start of a run takes to decode images
MOST = 20_000  # images whose headers are read at a start; of more, an evenly spaced sample
MOST_SUSPECT = 1000  # images that look cut off, which are decoded whatever time it takes
SMALL = 64  # pixels of a side, to compare images
FLAT = 2.0  # standard deviation of grey levels below which an image has nothing to compare

# Data sets of ours that may be built twice: they only list files.
LOCAL_TYPES = ("diffengine.datasets.ImageTextDataset", "diffengine.datasets.SubjectDataset")


def inspect(
    dataset: ImageDataset, shapes: Shapes | None = None, lengths: Lengths | None = None, *,
    seconds: float | None = SECONDS, most: int | None = MOST, side: int = SMALL,
    each: Callable[[int, Image.Image], object] = lambda index, image: None,
) -> Findings:  # fmt: skip
    """Look at a data set's images and captions. Images that cannot be read are noted, not raised.

    Args:
        dataset: to look at.
        shapes, lengths: as of `Findings`.
        seconds: that decoding may take; images that look cut off come first. None: all are decoded; 0: only headers
            are read, so that equal files are not found.
        most: of more images than this, an evenly spaced sample is looked at. None: all.
        side: of the images that `each` gets with their index, in pixels.
    """
    indices = evenly(len(dataset), most or len(dataset))
    with ThreadPoolExecutor() as pool:
        pairs = list(pool.map(lambda index: _header(dataset, index, seconds != 0), indices))
        first = {image.name: image for image, _ in reversed(pairs)}  # a file may be there several times
        images = [image for image, _ in pairs if first[image.name] is image]
        suspect = {image.index for image, ends_early in pairs if ends_early}
        if _lacks_images(dataset):
            images = [image for image in images if image.size or image.problem]
        order = sorted(range(len(images)), key=lambda at: (images[at].index not in suspect, at * GOLDEN_RATIO % 1))
        least = min(len(suspect), MOST_SUSPECT) if seconds else 0
        for at, image in _timed(pool, order, lambda at: _decoded(dataset, images[at], side, each), seconds, least):
            images[at] = image
    return Findings(images, len(dataset), len(indices), list(dataset.all_captions()), dataset.name, shapes, lengths)


def opened(dataset: Callable[[], ImageDataset]) -> tuple[ImageDataset, Problems]:
    """Build a data set; if that fails, its image files without captions, and what is wrong."""
    try:
        built = dataset()
        len(built)  # opens all sources
        return built, Problems()
    except UnusableData as error:
        return ImageFiles(error.images), error.found


def look(dataset: Callable[[], ImageDataset], name: str, shapes: Shapes | None, skip_unreadable: bool) -> ImageDataset:
    """Build a data set that is to be trained and, if it `is_encoded`, say what it is and what may hurt.

    Raises:
        UnusableData: all that is wrong with it.
    """
    built, problems = opened(dataset)
    if not is_encoded(built):
        return built
    findings = inspect(built, shapes)
    for image in findings.unreadable if not skip_unreadable else ():
        problems.add("images that cannot be read", image.problem or "")
    problems.raise_all(name)
    say(f"{name}: {findings.summary}", *(f"warning: {line}" for line in findings.warnings()))
    return built


def is_encoded(dataset: ImageDataset) -> bool:
    """Whether a data set has images as files or bytes: looking at one that makes its images would make them all."""
    try:
        return len(dataset) > 0 and dataset.encoded(0) is not None
    except UnreadableImage:
        return True


def look_at_section(loader: Mapping[str, Any], dataset: ImageDataset | None = None) -> ImageDataset:
    """`look` at the data of a config's `train_dataloader` section; `dataset` is what it describes, if it was built."""
    section = loader["dataset"]
    name = ", ".join(paths_of(section)) or section["type"].rpartition(".")[2]
    skip = bool(loader.get("skip_unreadable"))
    return look(lambda: open_dataset(section) if dataset is None else dataset, name, shapes_of(loader), skip)


def opened_section(loader: Mapping[str, Any]) -> tuple[ImageDataset, Problems]:
    """The data of a config's `train_dataloader` section, as of `opened`."""
    return opened(lambda: open_dataset(loader["dataset"]))


def shapes_of(loader: Mapping[str, Any], multiple: int | None = None) -> Shapes | None:
    """The shapes that a `train_dataloader` section makes of images.

    `multiple` is the model's `size_multiple`; None: such that the square has 16 x 16 of them, as aMUSEd's has.
    """
    square = Shapes.made_by([build(item) for item in loader.get("image_transforms") or ()])
    if square is None or loader.get("aspect", "square") == "square" or (multiple is None and square.side % MULTIPLES):
        return square
    return Shapes(square.side, multiple or square.side // MULTIPLES, loader.get("max_aspect", MAX_ASPECT))


def is_local(loader: Any) -> bool:
    """Whether a `train_dataloader` section, which nobody checked, reads files of this machine by classes of ours."""
    section = loader.get("dataset") if isinstance(loader, Mapping) else None
    if not isinstance(section, Mapping) or section.get("type") not in LOCAL_TYPES:
        return False
    paths = paths_of(section)
    try:
        shapes_of(loader)
        return bool(paths) and all(expanded(path).exists() for path in paths) and not problems_of(section, "dataset")
    except (UserError, TypeError, AttributeError):
        return False


@final
class ImageFiles(ImageDataset):
    """Image files without captions."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        return {"image": read_image(*self.encoded(index)), "text": ""}

    def all_captions(self) -> Iterator[list[str]]:
        return iter([])

    def encoded(self, index: int) -> tuple[str, str]:
        return str(self._files[index]), str(self._files[index])


def _timed(
    pool: ThreadPoolExecutor,
    items: Sequence[int],
    work: Callable[[int], ImageFacts],
    seconds: float | None,
    least: int,
) -> Iterator[tuple[int, ImageFacts]]:
    """(item, result) of each in turn until the time is over, but at least so many; shows a slow one's progress."""
    began, size, unreported = time.monotonic(), 4 * (os.cpu_count() or 1), 0
    with Progress(len(items), "looked at", "images") as progress:
        for start in range(0, len(items), size):
            if seconds is not None and start >= least and time.monotonic() - began >= seconds:
                return
            chosen = items[start : start + size]
            yield from zip(chosen, pool.map(work, chosen))
            unreported += len(chosen)
            if time.monotonic() - began > SHORT:
                progress.advance(unreported)
                unreported = 0


def _lacks_images(dataset: ImageDataset) -> bool:
    """Whether images are still to be generated."""
    try:
        return any(missing.numbers for missing in dataset.missing_images())
    except UserError:  # reported when they are generated
        return True


def _header(dataset: ImageDataset, index: int, read_more: bool) -> tuple[ImageFacts, bool]:
    """What an image's header says and, if more is to be read, its content's digest and whether it looks cut off."""
    image = ImageFacts(index, f"image {index}")
    try:
        image = ImageFacts(index, dataset.name(index))
        source = dataset.encoded(index)
        if source is None:
            return replace(image, size=dataset.size(index)), False
        size, mask = read_size(*source), dataset.encoded_mask(index)
        if mask is not None:
            check_mask_size(mask[1], read_size(*mask), image.name, size)
        image = replace(image, size=size, masked=mask is not None)
        if not read_more:
            return image, False
        content = hashlib.blake2b(dataset.content(index) or b"", digest_size=16).digest()
        return replace(image, content=content), ends_early(source[0])
    except UnreadableImage as error:
        return replace(image, problem=str(error)), False
    except UserError:  # an image that is still to be generated
        return image, False


def _decoded(
    dataset: ImageDataset, image: ImageFacts, side: int, each: Callable[[int, Image.Image], object]
) -> ImageFacts:
    """With what its pixels say."""
    if image.problem:
        return image
    try:
        source = dataset.encoded(image.index)
        small = read_small(*source, side) if source else dataset[image.index]["image"].copy()
        encoded_mask = dataset.encoded_mask(image.index)
        mask = read_mask(*encoded_mask) if encoded_mask else None
    except UnreadableImage as error:
        return replace(image, problem=str(error))
    except (UserError, LookupError, TypeError, AttributeError):  # as of `_header`; or no sample: the stream reports it
        return image
    small.thumbnail((side, side))
    each(image.index, faded(small, mask))
    grey = np.asarray(small.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = None if grey.std() < FLAT else int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")
    levels = np.asarray(small.resize((8, 8), Image.Resampling.BOX), dtype=np.int16).reshape(-1)
    return replace(image, decoded=True, bits=bits, levels=levels)
