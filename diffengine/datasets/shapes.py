"""The shapes in which images of any size are trained: one square, or the token grid nearest to an image's own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, final

from diffengine.datasets.base import Size
from diffengine.errors import require

Aspect = Literal["square", "keep"]


@final
@dataclass(frozen=True)
class Shapes:
    """Sizes in pixels, all of about as many tokens as a square's.

    With n multiples along the square's side, they are all grids of a x b multiples that have at most n * n tokens and
    at most 2 n fewer. The one nearest to an image's ratio loses less than one multiple of a side (tested to n = 64).

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

    def of(self, size: Size) -> Size:
        """The shape of an image of this size: the one with the nearest ratio, and of these the largest."""
        ratio = math.log(size[0] / size[1])
        return min(self.all, key=lambda shape: abs(ratio - math.log(shape[0] / shape[1])))

    @classmethod
    def made_by(cls, transforms: Sequence[Any]) -> "Shapes | None":
        """What a stream's image transforms make; None if that is not known."""
        sizes = [size for size in (getattr(item, "size", None) for item in transforms) if size]
        return cls(sizes[-1]) if sizes else None
