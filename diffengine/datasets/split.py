"""Which images are held out of training, by their content."""

import hashlib
from dataclasses import dataclass

from diffengine.datasets.base import ImageDataset, UnreadableImage
from diffengine.datasets.findings import spread
from diffengine.errors import require

SMALLEST_DATA = 32  # images; fewer are all trained
FEWEST, MOST = 8, 64  # held-out images


@dataclass(frozen=True)
class Split:
    """Indices of a data set, rising.

    Attributes:
        train: trained; None for all.
        held_out: not trained.
        twin: up to 64 trained images, to compare with.
        digests: of the content of `held_out` and `twin` images, by index.
    """

    train: list[int] | None
    held_out: list[int]
    twin: list[int]
    digests: dict[int, int]


def hold_out(dataset: ImageDataset, share: float) -> Split:
    """Hold out a share of a data set's images, from 8 to 64: those with the smallest digests of their content.

    So duplicates fall on one side, and images that are added later leave most of the split unchanged. Nothing is held
    out of fewer than 32 images, or if their content is not known. If nothing is asked for, only the twin's images are
    read.

    Args:
        share: in [0, 1); 0 holds nothing out.
    """
    require(0 <= share < 1, f"validation_share got {share}; expected a number from 0, below 1")
    digests: dict[int, int] = {}
    for index in range(len(dataset)) if share > 0 else spread(len(dataset), MOST):
        try:
            content = dataset.content(index)
        except UnreadableImage:
            continue
        if content is not None:
            digests[index] = digest_of(content)
    distinct = sorted(set(digests.values()))
    enough = share > 0 and len(distinct) >= SMALLEST_DATA
    count = min(MOST, max(FEWEST, round(share * len(distinct)))) if enough else 0
    chosen = {*distinct[:count]}
    held_out = [index for index, digest in digests.items() if digest in chosen]
    first = {digest: index for index, digest in reversed(digests.items())}  # one image of each content
    twin = sorted(first[digest] for digest in distinct[count : count + MOST])
    train = [index for index in range(len(dataset)) if digests.get(index) not in chosen] if held_out else None
    return Split(train, held_out, twin, {index: digests[index] for index in (*held_out, *twin)})


def digest_of(content: bytes) -> int:
    """64 bits that follow from an image's content."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
