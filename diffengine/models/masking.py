"""Which tokens are masked: pure functions of numbers and tensors.

Legend: B batch, h w token grid, L = h * w, n masked tokens of one image, M masked tokens of the batch.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from diffengine.errors import UserError

Schedule = Literal["cosine", "linear"]


def mask_ratio(t: float, schedule: Schedule = "cosine") -> float:
    """The share of tokens masked at time t in [0, 1]: cos(pi t / 2) (MaskGIT, arXiv 2202.04200) or 1 - t.

    These are the two schedules that diffusers' AmusedScheduler samples with.
    """
    return math.cos(math.pi * t / 2) if schedule == "cosine" else 1.0 - t


def num_masked(t: float, num_tokens: int, schedule: Schedule = "cosine") -> int:
    """n = round(L * ratio(t)), at least 1; halves round to even."""
    return max(1, round(num_tokens * mask_ratio(t, schedule)))


@final
class TokenGrid:
    """Checks that an image fits the model's token grid, as the last transform of the data pipeline.

    Args:
        factor: pixels per token and side, f.
        multiple: the token grid's sides must be multiples of it (2 for a transformer that downsamples).
    """

    def __init__(self, factor: int, multiple: int = 1) -> None:
        self.factor = factor
        self.multiple = multiple

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        if "image" in sample:
            self.sides(*sample["image"].shape[-2:])
        return sample

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """The sides (h, w) of the token grid of an image with these sides in pixels.

        Raises:
            UserError: they are not divisible.
        """
        step = self.factor * self.multiple
        if height % step or width % step or min(height, width) < step:
            raise UserError(
                f"got images of {width}x{height} px; this model needs sides divisible by {step} ({self.factor} px per "
                f"token{', halved once more inside' if self.multiple > 1 else ''}): set resolution to "
                f"{max(step, round(width / step) * step)}"
            )
        return height // self.factor, width // self.factor


@final
class RandomMask:
    """Draws a sample's masked positions, as the last transform of the data pipeline.

    Adds `masked`, int64 (n,), the first n = `num_masked(t)` entries of a random order of the image's L positions with
    t ~ U(0, 1), and `num_targets` = n.

    Args:
        grid: the model's token grid.
        schedule: of `mask_ratio`.
    """

    def __init__(self, grid: TokenGrid, schedule: Schedule = "cosine") -> None:
        self.grid = grid
        self.schedule = schedule

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        if "token_ids" in sample:
            num_tokens = sample["token_ids"].numel()
        else:
            num_tokens = math.prod(self.grid.sides(*sample["image"].shape[-2:]))
        n = num_masked(rng.random(), num_tokens, self.schedule)
        return {**sample, "masked": rng.permutation(num_tokens)[:n], "num_targets": n}


def masked_index(masked: Sequence[np.ndarray], num_tokens: int) -> Tensor:
    """Flat positions (M,) int64 in a (B, h, w) batch, from each image's `masked` (n_i,).

    Made on the host: `x[mask]` and `nonzero` would wait for the device.
    """
    return torch.from_numpy(np.concatenate([row + index * num_tokens for index, row in enumerate(masked)]))


def mask_tokens(token_ids: Tensor, index: Tensor, mask_id: int) -> Tensor:
    """`input_ids` (B, h, w): the tokens with `mask_id` at the flat positions `index` (M,)."""
    return token_ids.flatten().index_fill(0, index, mask_id).view_as(token_ids)
