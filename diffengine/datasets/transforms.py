"""What is done to a sample between the data set and the batch.

A transform takes a sample and a generator and gives the sample back, changed. It draws equally many random
values whatever its options are, so that changing one probability does not shift the draws that follow.
To add one, write a class with this `__call__` and name it in a config.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from diffengine.datasets.images import Sample
from diffengine.errors import UserError


class Transform(Protocol):
    """sample, generator -> sample.

    It may have a method `effect(size)`: of an image of this (width, height), or of any size where that is
    None, the size afterwards, and whether what becomes of it depends on what is drawn. Without one it does.
    """

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample: ...


Size = tuple[int, int]  # (width, height)
LONGEST = 64  # times the short side of what is resized


def draws_matter(transforms: Sequence[Transform], size: Size | None) -> bool:
    """Whether an image of this size, or of any, becomes another from draw to draw."""
    for transform in transforms:
        if not hasattr(transform, "effect"):
            return True
        size, drawn = transform.effect(size)
        if drawn:
            return True
    return False


class Resize:
    """The short side to `size` pixels, aspect kept, bilinear and antialiased.

    Records `original_size`, (width, height) before, if no transform has yet. Of an image that is more than
    `LONGEST` times as long as it is wide only the middle is taken: a line would become gigabytes.
    """

    def __init__(self, size: int) -> None:
        self.size = _at_least_one("Resize", size)

    def effect(self, size: Size | None) -> tuple[Size | None, bool]:
        return size and self._resized(size), False

    def _resized(self, size: Size) -> Size:
        short = min(size)
        width, height = (max(self.size, round(min(side, LONGEST * short) * (self.size / short))) for side in size)
        return width, height

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image: Image.Image = sample["image"]
        original_size, longest = image.size, LONGEST * min(image.size)
        if max(image.size) > longest:
            left, top = (max(0, side - longest) // 2 for side in image.size)
            image = image.crop((left, top, left + min(image.width, longest), top + min(image.height, longest)))
        # Above a shrinking of six times a box filter does the first part; the difference cannot be seen.
        resized = image.resize(self._resized(image.size), Image.Resampling.BILINEAR, reducing_gap=3.0)
        return {"original_size": original_size, **sample, "image": resized}


class Crop:
    """A square of `size` pixels, at a random place, or from the centre with random=False.

    Records `crop_top_left`, (top, left) in pixels of the image as it comes in, `crop_from`, its
    (width, height), and `original_size`, if no transform has yet. Raises UserError for an image that is
    smaller than the square.
    """

    def __init__(self, size: int, random: bool = True) -> None:
        self.size = _at_least_one("Crop", size)
        self.random = random

    def effect(self, size: Size | None) -> tuple[Size, bool]:
        square = (self.size, self.size)
        return square, self.random and size != square

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image: Image.Image = sample["image"]
        width, height = image.size
        if min(width, height) < self.size:
            raise UserError(
                f"Crop got an image of {width}x{height}; expected at least {self.size}x{self.size}; "
                f"put Resize({self.size}) before it"
            )
        room = (height - self.size, width - self.size)
        shares = rng.random(2)
        if self.random:
            top, left = (int(share * (free + 1)) for share, free in zip(shares, room))
        else:
            top, left = (free // 2 for free in room)
        square = image.crop((left, top, left + self.size, top + self.size))
        records = {"crop_top_left": (top, left), "crop_from": image.size}
        return {"original_size": image.size, **sample, "image": square, **records}


class Flip:
    """Mirrors the image left to right with probability `p`, default 0.5.

    After a crop, its left is counted anew in the mirrored image, which is the one that the model is shown.
    """

    def __init__(self, p: float = 0.5) -> None:
        self.p = _probability("Flip", p)

    def effect(self, size: Size | None) -> tuple[Size | None, bool]:
        return size, 0 < self.p < 1

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if rng.random() >= self.p:
            return sample
        image: Image.Image = sample["image"]
        flipped = {**sample, "image": image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)}
        if "crop_top_left" in sample:
            top, left = sample["crop_top_left"]
            flipped["crop_top_left"] = (top, sample["crop_from"][0] - image.width - left)
        return flipped


class ToTensor:
    """The image and what is known of it, as tensors.

    `image`: (3, H, W) float32 in [0, 1]. `micro_conds`: (5,) float32 of original width, original height, crop
    top, crop left, in pixels, and the aesthetic score, default 6.0. The records of the other transforms go.
    """

    def __init__(self, aesthetic_score: float = 6.0) -> None:
        self.aesthetic_score = aesthetic_score

    def effect(self, size: Size | None) -> tuple[Size | None, bool]:
        return size, False

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image: Image.Image = sample["image"]
        records = ("original_size", "crop_top_left", "crop_from")
        original_size = sample.get("original_size", image.size)
        crop_top_left = sample.get("crop_top_left", (0, 0))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return {
            **{key: value for key, value in sample.items() if key not in records},
            "image": pixels.to(torch.float32).div_(255),
            "micro_conds": torch.tensor([*original_size, *crop_top_left, self.aesthetic_score], dtype=torch.float32),
        }


class DropCaption:
    """Replaces the caption by "" with probability `p`, default 0.1: what guidance steers away from."""

    def __init__(self, p: float = 0.1) -> None:
        self.p = _probability("DropCaption", p)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return {**sample, "text": ""} if rng.random() < self.p else sample


def _probability(name: str, p: float) -> float:
    if not 0 <= p <= 1:
        raise UserError(f"{name} got p={p}; expected a probability from 0 to 1")
    return p


def _at_least_one(name: str, size: int) -> int:
    if size < 1:
        raise UserError(f"{name} got size={size}; expected at least 1 pixel")
    return size
