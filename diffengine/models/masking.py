"""Which tokens are masked: pure functions of numbers and tensors.

Legend: B batch, h w token grid, L = h * w, n masked tokens of one image, M masked tokens of the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from diffengine.errors import require

Schedule = Literal["cosine", "linear"]
BUCKETS = 8  # of t, for losses by the share of masked tokens: eighths of [0, 1), nearly all masked to few


def num_masked(t: float, num_tokens: int, schedule: Schedule = "cosine") -> int:
    """n = round(L * ratio(t)) tokens are masked at time t in [0, 1], at least 1; halves round to even.

    The ratio is cos(pi t / 2) (MaskGIT, arXiv 2202.04200) or 1 - t: those with which AmusedScheduler generates.
    """
    ratio = math.cos(math.pi * t / 2) if schedule == "cosine" else 1.0 - t
    return max(1, round(num_tokens * ratio))


@final
@dataclass(frozen=True)
class TokenGrid:
    """Checks that an image fits the model's token grid, as the last transform of the data pipeline."""

    factor: int  # pixels per token and side, f
    multiple: int = 1  # divides the grid's sides: 2 for a transformer that downsamples

    @classmethod
    def of(cls, vqvae_config: Any, transformer_config: Any) -> "TokenGrid":
        """The grid of a model, from the configs of its VQ model and transformer."""
        factor = 2 ** (len(vqvae_config["block_out_channels"]) - 1)
        return cls(factor, 2 if transformer_config["downsample"] else 1)

    @property
    def pixels(self) -> int:
        """By which an image's sides must be divisible."""
        return self.factor * self.multiple

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        if "image" in sample:
            self.of_image(sample["image"])
        return sample

    def of_image(self, image: Any) -> tuple[int, int]:
        """The sides (h, w) of the token grid of an image (3,H,W); a UserError if it is no tensor, or as of `sides`."""
        got = f"the image transforms give a {type(image).__name__}"
        require(isinstance(image, Tensor), f"{got}, expected a tensor: put ToTensor last among them")
        return self.sides(*image.shape[-2:])

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """The sides (h, w) of the token grid for an image's in pixels; a UserError if they are not divisible."""
        step = self.pixels
        halved = ", halved once more inside" if self.multiple > 1 else ""
        require(
            height % step == width % step == 0 and min(height, width) >= step,
            f"got images of {width}x{height} px; this model needs sides divisible by {step} ({self.factor} px per token"
            f"{halved}): set resolution to {max(step, round(width / step) * step)}",
        )
        return height // self.factor, width // self.factor


@final
@dataclass(frozen=True)
class RandomMask:
    """Draws a sample's masked positions, as the last transform of the data pipeline.

    Adds `masked`, int64 (n,): the first n = `num_masked(t)` of the image's L positions in random order, for
    t ~ U(0, 1); `num_targets` = n; `num_tokens` = L; and `bucket`, the eighth of [0, 1) that t is in, from 0.
    """

    grid: TokenGrid
    schedule: Schedule = "cosine"

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        if "token_ids" in sample:
            num_tokens = sample["token_ids"].numel()
        else:
            num_tokens = math.prod(self.grid.of_image(sample["image"]))
        t = rng.random()
        n = num_masked(t, num_tokens, self.schedule)
        counts = {"num_targets": n, "num_tokens": num_tokens, "bucket": int(BUCKETS * t)}
        return {**sample, "masked": rng.permutation(num_tokens)[:n], **counts}


def masked_index(masked: Sequence[np.ndarray], num_tokens: int) -> Tensor:
    """Flat positions (M,) int64 in a (B,h,w) batch, from each image's `masked` (n_i,), on the host."""
    return torch.from_numpy(np.concatenate([row + index * num_tokens for index, row in enumerate(masked)]))


def sums_by_bucket(values: Tensor, index: Tensor, bucket: Tensor, num_tokens: int) -> Tensor:
    """Sums (`BUCKETS`,) of masked tokens' values (M,) at flat positions `index` (M,), by their image's bucket (B,)."""
    rows = index.div(num_tokens, rounding_mode="floor")
    return values.new_zeros(BUCKETS).index_add_(0, bucket.index_select(0, rows), values)


def sums_by_source(values: Tensor, index: Tensor, source: Tensor, num_tokens: int) -> Tensor:
    """Sums (S,) of masked tokens' values (M,) at flat positions `index` (M,), by their image's one-hot source (B,S)."""
    rows = index.div(num_tokens, rounding_mode="floor")
    return (values[:, None] * source.index_select(0, rows)).sum(dim=0)


def mask_tokens(token_ids: Tensor, index: Tensor, mask_id: int) -> Tensor:
    """`input_ids` (B, h, w): the tokens with `mask_id` at the flat positions `index` (M,)."""
    return token_ids.flatten().index_fill(0, index, mask_id).view_as(token_ids)
