"""Whether a generated image is nearer to the image of its caption than to the others, by pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_SIDE = 64  # larger images are reduced to it before they are compared


@dataclass(frozen=True)
class Gallery:
    """Images that generated ones are compared with, each with its caption."""

    captions: Sequence[str]
    images: Sequence[Image.Image]

    def ranks(self, images: Sequence[Image.Image], captions: Sequence[str]) -> np.ndarray:
        """(N,) int: for each image, how many of the gallery's with another caption are nearer than its own.

        Distances are L2 over pixels. Rank 0 counts for retrieval@1, ranks 0 to 4 for retrieval@5.
        """
        distances = torch.cdist(_pixels(images), self._pixels).numpy()
        right = np.asarray(captions)[:, None] == np.asarray(self.captions)[None, :]
        own = np.where(right, distances, np.inf).min(axis=1, keepdims=True)
        return ((distances < own) & ~right).sum(axis=1)

    @cached_property
    def _pixels(self) -> Tensor:
        return _pixels(self.images)


def rate(ranks_N: np.ndarray, k: int) -> tuple[float, float]:
    """retrieval@k and its standard error, that of a share of N independent trials."""
    share = float((ranks_N < k).mean())
    return share, float(np.sqrt(share * (1 - share) / len(ranks_N)))


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    """(N,3*H*W) float64."""
    arrays = []
    for image in images:
        side = max(image.size)
        if side > MAX_SIDE:
            size = [max(1, round(length * MAX_SIDE / side)) for length in image.size]
            image = image.resize((size[0], size[1]), Image.Resampling.BOX)
        arrays.append(np.asarray(image.convert("RGB"), dtype=np.float64).ravel())
    return torch.from_numpy(np.stack(arrays))
