"""What cropping to a square and cutting captions will do to a data set, told before training starts."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from diffengine.datasets.images import UnreadableImage
from diffengine.errors import UserError


class Sized(Protocol):
    """A data set that knows the size of its images without decoding them."""

    def __len__(self) -> int: ...
    def size(self, index: int, /) -> tuple[int, int]: ...


def survey(dataset: Sized, resolution: int, limit: int = 2000) -> str:
    """One line: how many images, how much of them the square crop cuts off, how many are enlarged.

    resolution: the side of the square in pixels. limit: of more images than this, evenly spaced ones are
    looked at, by their headers. Images that cannot be read are counted, not raised.
    """
    if limit < 1:
        raise UserError(f"survey got limit {limit}; expected at least 1")
    places = _spread(len(dataset), limit)
    sizes, unreadable = [], 0
    for place in places:
        try:
            sizes.append(dataset.size(place))
        except UnreadableImage:
            unreadable += 1
    line = _looked_at(places, len(dataset), "images")
    if sizes:
        sides = np.sort(np.array(sizes), axis=1)
        cut = 1 - (sides[:, 0] / sides[:, 1]).mean()
        small = (sides[:, 0] < resolution).mean()
        line += f"; the {resolution} px square cuts off {cut:.1%} of the area and {small:.1%} are enlarged"
    return line + (f"; {unreadable} cannot be read" if unreadable else "")


def survey_captions(
    captions: Iterable[str], lengths: Callable[[Sequence[str]], tuple[list[int], int]], limit: int = 1000
) -> str | None:
    """One line: how many captions are longer than the model reads, and the longest; None where none is.

    lengths: the tokens of each of these captions, and the most that the model reads of one, 0 for a model
    that reads none. limit: of more captions than this, evenly spaced ones are looked at.
    """
    known = list(captions)
    places = _spread(len(known), limit)
    tokens, most = lengths([known[place] for place in places])
    cut = sum(count > most for count in tokens)
    if not most or not cut:
        return None
    looked_at = _looked_at(places, len(known), "captions")
    return f"{looked_at}: {cut} are longer than {most} tokens and are cut there; the longest has {max(tokens)}"


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of so many places, evenly spaced."""
    return np.linspace(0, count - 1, min(limit, count)).round().astype(int).tolist()


def _looked_at(places: Sequence[int], count: int, what: str) -> str:
    return f"{count} {what}" + (f", {len(places)} of them looked at" if len(places) < count else "")
