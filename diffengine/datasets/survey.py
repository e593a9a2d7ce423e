"""What the square crop and the text length will cut off a data set, reported before training starts."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import numpy as np

from diffengine.datasets.base import ImageDataset, Size, UnreadableImage
from diffengine.datasets.shapes import Shapes
from diffengine.errors import require
from diffengine.text import shortened

GOLDEN_RATIO = 0.6180339887498949
SHAPES_SHOWN = 4
SHOWN = 80  # characters of what a caption loses


def survey(dataset: ImageDataset, shapes: Shapes, limit: int = 2000) -> str | None:
    """One line: how many images in which shapes, what share of their area is cut off, how many are enlarged.

    Images that cannot be read are counted, not raised. None if the data set does not know its images' sizes.

    Args:
        dataset: whose images' headers are read.
        shapes: in which they are trained.
        limit: of more images than this, an evenly spaced sample is read.
    """
    require(limit >= 1, f"survey got limit {limit}; expected at least 1")
    indices = _spread(len(dataset), limit)
    sizes: list[Size] = []
    for index in indices:
        with suppress(UnreadableImage):
            size = dataset.size(index)
            if size is None:
                return None
            sizes.append(size)
    line = _sampled(indices, len(dataset), "images")
    if sizes:
        line += f"; {_crops(sizes, shapes)} and {shapes.enlarged(sizes):.1%} are enlarged"
    unreadable = len(indices) - len(sizes)
    return line + (f"; {unreadable} cannot be read" if unreadable else "")


def _crops(sizes: Sequence[Size], shapes: Shapes) -> str:
    square = f"the {shapes.side} px square cuts off {shapes.square.lost(sizes):.1%} of the area"
    if len(shapes.all) == 1:
        return square
    counts = Counter(map(shapes.of, sizes)).most_common()
    most = ", ".join(f"{width}x{height} {count}" for (width, height), count in counts[:SHAPES_SHOWN])
    more = f", {len(counts) - SHAPES_SHOWN} more" if len(counts) > SHAPES_SHOWN else ""
    return f"{len(counts)} shapes ({most}{more}) cut off {shapes.lost(sizes):.1%} of the area, where {square}"


def survey_captions(
    captions: Iterable[str], lengths: Callable[[Sequence[str]], tuple[list[int], int]], limit: int = 1000
) -> str | None:
    """One line: how many captions are longer than the model reads, and what the longest loses. None if none is cut.

    Args:
        captions: all captions of the data.
        lengths: the number of tokens of each of these captions, and the most that the model reads of one (0: none).
        limit: of more captions than this, an evenly spaced sample is counted.
    """
    known = list(captions)
    indices = _spread(len(known), limit)
    tokens, most = lengths([known[index] for index in indices])
    cut = sum(count > most for count in tokens)
    if not most or not cut:
        return None
    words = known[indices[tokens.index(max(tokens))]].split()
    read = bisect_right(range(1, len(words)), most, key=lambda count: lengths([" ".join(words[:count])])[0][0])
    lost = len(words) - read
    sampled, plural = _sampled(indices, len(known), "captions"), "" if lost == 1 else "s"
    loss = f"loses its last {lost} word{plural}: '{shortened(' '.join(words[read:]), SHOWN)}'"
    return f"{sampled}: {cut} are longer than {most} tokens and are cut there; the longest has {max(tokens)} and {loss}"


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` indices, evenly spaced."""
    return np.linspace(0, count - 1, min(limit, count)).round().astype(int).tolist()


def _sampled(indices: Sequence[int], count: int, what: str) -> str:
    return f"{count} {what}" + (f", {len(indices)} of them sampled" if len(indices) < count else "")


def spread(total: int, count: int) -> list[int]:
    """`count` of `total` indices, rising, spread by the golden ratio: equal steps would coincide with groups."""
    return sorted(sorted(range(total), key=lambda index: index * GOLDEN_RATIO % 1)[:count])
