"""What cropping to a square will do to a data set, told before training starts."""

from typing import Protocol

import numpy as np

from diffengine.datasets.pictures import UnreadablePicture
from diffengine.errors import UserError


class Sized(Protocol):
    """A data set that knows the size of its pictures without decoding them."""

    def __len__(self) -> int: ...
    def size(self, index: int, /) -> tuple[int, int]: ...


def survey(dataset: Sized, resolution: int, limit: int = 2000) -> str:
    """One line: how many pictures, how much of them the square crop cuts off, how many are enlarged.

    resolution: the side of the square in pixels. limit: of more pictures than this, evenly spaced ones are
    looked at, by their headers. Pictures that cannot be read are counted, not raised.
    """
    if limit < 1:
        raise UserError(f"survey got limit {limit}; expected at least 1")
    places = np.linspace(0, len(dataset) - 1, min(limit, len(dataset))).round().astype(int).tolist()
    sizes, unreadable = [], 0
    for place in places:
        try:
            sizes.append(dataset.size(place))
        except UnreadablePicture:
            unreadable += 1
    line = f"{len(dataset)} pictures" + (
        f", {len(places)} of them looked at" if len(places) < len(dataset) else ""
    )
    if sizes:
        sides = np.sort(np.array(sizes), axis=1)
        cut = 1 - (sides[:, 0] / sides[:, 1]).mean()
        small = (sides[:, 0] < resolution).mean()
        line += f"; the {resolution} px square cuts off {cut:.1%} of the area and {small:.1%} are enlarged"
    return line + (f"; {unreadable} cannot be read" if unreadable else "")
