"""The shapes in which images of any size are trained: one square, or the token grid nearest to an image's own."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, final

import numpy as np

from diffengine.datasets.base import Sample, Size
from diffengine.datasets.transforms import AnyTransform, Resize, Transform, apply, effect_of, mirroring
from diffengine.errors import require

Aspect = Literal["square", "keep"]
MULTIPLES = 16  # along the side of aMUSEd's square
MAX_ASPECT = 2.0  # of aspect="keep", if it is not set


@final
@dataclass(frozen=True)
class Shapes:
    """Sizes in pixels, all of about as many tokens as a square's.

    With n multiples along the square's side, they are all grids of a x b multiples for which a * b is at most n * n and
    at most 2 n less. In the one nearest to its own ratio, an image loses at most one multiple of one side.

    Args:
        side: of the square, in pixels.
        multiple: by which sides must be divisible, in pixels.
        max_aspect: the largest ratio of the long to the short side; 1 leaves only the square.
    """

    side: int
    multiple: int = 1
    max_aspect: float = 1.0

    def __post_init__(self) -> None:
        require(self.max_aspect >= 1, f"max_aspect got {self.max_aspect}; expected a ratio from 1, such as 2 for 2:1")
        fits = self.max_aspect == 1 or self.side % self.multiple == 0
        nearest = max(self.multiple, round(self.side / self.multiple) * self.multiple)
        message = f"resolution got {self.side}; this model needs sides divisible by {self.multiple}"
        require(fits, f"{message}: set resolution to {nearest}")

    @cached_property
    def all(self) -> list[Size]:
        """(width, height) of each, those with the most tokens first."""
        if self.max_aspect == 1:
            return [(self.side, self.side)]
        n = self.side // self.multiple
        widest = math.isqrt(int(n * n * self.max_aspect)) + 1
        pairs = [(a, b) for a in range(1, widest + 1) for b in range(max(1, n * (n - 2) // a), n * n // a + 1)]
        fitting = [(a, b) for a, b in pairs if a * b >= n * (n - 2) and max(a, b) <= self.max_aspect * min(a, b)]
        most = sorted(fitting, key=lambda grid: (-math.prod(grid), max(grid), grid))
        return [(a * self.multiple, b * self.multiple) for a, b in most]

    @property
    def is_usual(self) -> bool:
        """Whether these are what is assumed before a model is known: as aMUSEd's, or the square alone."""
        return self.max_aspect == 1 or self.side == MULTIPLES * self.multiple

    @property
    def square(self) -> "Shapes":
        """The square alone."""
        return Shapes(self.side)

    def of(self, size: Size) -> Size:
        """The shape of an image of this size: the one with the nearest ratio, and of these the largest."""
        ratio = math.log(size[0] / size[1])
        return min(self.all, key=lambda shape: abs(ratio - math.log(shape[0] / shape[1])))

    def lost(self, sizes: Iterable[Size]) -> float:
        """The mean share of the area that images of these sizes lose when they are cropped to their shapes."""
        return float(np.mean([1 - min(scales := _scales(size, self.of(size))) / max(scales) for size in sizes]))

    def enlarged(self, sizes: Iterable[Size]) -> float:
        """The share of images of these sizes that are smaller than their shapes."""
        return float(np.mean([self.scale(size) > 1 for size in sizes]))

    def scale(self, size: Size) -> float:
        """By how much an image of this size is enlarged, or reduced if below 1, to cover its shape."""
        return max(_scales(size, self.of(size)))

    @classmethod
    def made_by(cls, transforms: Sequence[AnyTransform]) -> "Shapes | None":
        """What a stream's image transforms make; None if that is not known."""
        if transforms and isinstance(transforms[0], ByShape):
            return transforms[0].shapes
        size = effect_of(transforms, None)[0]
        return cls(size[0]) if size is not None and size[0] == size[1] else None


def _scales(size: Size, shape: Size) -> tuple[float, float]:
    return shape[0] / size[0], shape[1] / size[1]


@final
class ByShape(Transform):
    """Image transforms that make a square, each time made for the shape that is nearest to the image's.

    Args:
        transforms: they end in a square of `shapes.side` pixels.
    """

    def __init__(self, transforms: Sequence[AnyTransform], shapes: Shapes) -> None:
        sizes = {item.size for item in transforms if isinstance(item, Resize)}
        square = (shapes.side, shapes.side)
        got = f"aspect='keep' got Resize to {' and '.join(map(str, sizes)) or 'nothing'}, and images of {square}"
        require(sizes == {square}, f"{got}; expected a Resize and a Crop of one size among the image transforms")
        self.shapes = shapes
        self._transforms = list(transforms)
        self._made = {shape: [_made_for(shape, item) for item in transforms] for shape in shapes.all}

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return apply(self._made[self.shapes.of(sample["image"].size)], sample, rng)

    def mirroring(self, p: float) -> "ByShape":
        return ByShape(mirroring(self._transforms, p), self.shapes)

    def effect(self, size: Size | None) -> tuple[Size | None, bool]:
        return (None, True) if size is None else effect_of(self._made[self.shapes.of(size)], size)


def _made_for(shape: Size, transform: AnyTransform) -> AnyTransform:
    return transform.for_shape(shape) if isinstance(transform, Transform) else transform


def in_runs(order: np.ndarray, shapes: np.ndarray, head: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """An order in which as many steps as possible are of one shape: of each, runs that fill whole steps.

    Args:
        order: (N,) what is ordered, in random order.
        shapes: (N,) the shape of each, as a number.
        head: of the N, how many belong to the step that the previous epoch began.
        size: of a step.

    Returns:
        (N,) the head, then runs of one shape and of what is left over, in random order, then the begun last step. What
        is left over of the shapes is in the same order as their first appearance.
    """
    head = min(head, len(order))
    tail = (len(order) - head) % size
    runs, rest = [], order[:0]
    for shape in dict.fromkeys(shapes.tolist()):
        members = order[shapes == shape]
        whole = len(members) // size * size
        runs += np.split(members[:whole], range(size, whole, size)) if whole else []
        rest = np.concatenate([rest, members[whole:]])
    while len(rest) < head + tail:
        rest = np.concatenate([rest, runs.pop()])
    end = len(rest) - tail
    runs += [rest[start : start + size] for start in range(head, end, size)]
    return np.concatenate([rest[:head], *(runs[index] for index in rng.permutation(len(runs))), rest[end:]])
