"""The loss on images, at eight fixed shares of masked tokens: equal in every run, on any number of ranks, in any batch.

Legend: N images, h w token grid, L = h * w.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffengine import distributed
from diffengine.datasets import Sample, as_list, collate, generator
from diffengine.datasets.stream import VALIDATION
from diffengine.models.base import MaskedImageModel
from diffengine.models.frozen import evaluating
from diffengine.models.masking import num_masked

TIMES = tuple((index + 0.5) / 8 for index in range(8))


@dataclass(frozen=True)
class FixedImage:
    """A tokenized image with its caption, and the order in which its tokens are masked."""

    sample: Sample  # without image: `token_ids` (h,w), `micro_conds` (5,), `text`
    order_L: np.ndarray  # int64; the masks are its beginnings, so they are nested


def fixed_images(model: MaskedImageModel, samples: Sequence[tuple[Sample, int]], seed: int) -> list[FixedImage]:
    """Tokenize samples; an image's order follows from the seed and the digest of its content, which is given too."""
    images = []
    for sample, digest in samples:
        if "token_ids" not in sample:
            assert model.encoder is not None
            encoded = model.encoder.encode_images(sample["image"][None])
            sample = {**sample, **{name: value[0] for name, value in encoded.items()}}
        kept = {key: value for key, value in sample.items() if key not in ("image", "weight")}
        order_L = generator(seed, VALIDATION, digest).permutation(sample["token_ids"].numel())
        images.append(FixedImage({**kept, "text": as_list(sample["text"])[0]}, order_L))
    return images


@dataclass(frozen=True)
class Losses:
    """Sums over masked tokens, (8,) float64 each, by t."""

    loss: Tensor
    correct: Tensor
    tokens: Tensor

    @property
    def mean(self) -> float:
        """Cross entropy per masked token over all t: what training minimizes, in nats."""
        return float(self.loss.sum() / self.tokens.sum())

    @property
    def accuracy(self) -> float:
        return float(self.correct.sum() / self.tokens.sum())

    @property
    def by_time(self) -> list[float]:
        """The mean at each t."""
        return (self.loss / self.tokens).tolist()


def losses(
    model: MaskedImageModel, images: Sequence[FixedImage], *, captions: bool, batch_size: int,
    autocast: AbstractContextManager,
) -> Losses:  # fmt: skip
    """Evaluate a model on images, with or without their captions. Every rank takes a share, and gets the whole sums."""
    sums = torch.zeros(3, len(TIMES), dtype=torch.float64)
    mine = images[distributed.rank() :: distributed.world_size()]
    schedule = model.mask_schedule
    found: list[tuple[int, Tensor, Tensor]] = []
    with evaluating(model), autocast:
        for number, time in enumerate(TIMES):
            for start in range(0, len(mine), batch_size):
                samples = [_masked(image, time, schedule, captions) for image in mine[start : start + batch_size]]
                batch = collate(samples)
                loss, logs = model(model.prepare(batch))
                found.append((number, loss.double(), logs["accuracy"].double()))
                sums[2, number] += sum(batch["num_targets"])
    if found:  # one read from the device
        values = torch.stack([torch.stack(pair) for _, *pair in found]).cpu()
        for (number, *_), pair in zip(found, values):
            sums[:2, number] += pair
    return Losses(*torch.tensor(distributed.add_counts(*sums.flatten().tolist()), dtype=torch.float64).view(3, -1))


def _masked(image: FixedImage, time: float, schedule: Any, captions: bool) -> Sample:
    count = num_masked(time, len(image.order_L), schedule)
    text = image.sample["text"] if captions else ""
    return {**image.sample, "text": text, "masked": image.order_L[:count], "num_targets": count}


def unigram_loss(trained: Sequence[Tensor], images: Sequence[FixedImage], codes: int) -> float:
    """Cross entropy of images' tokens under the frequencies of trained ones, each counted once more, in nats."""
    counts = torch.ones(codes, dtype=torch.float64)
    for token_ids in trained:
        counts += torch.bincount(token_ids.flatten().long(), minlength=codes)
    logs = (counts / counts.sum()).log()
    return -float(torch.cat([logs[image.sample["token_ids"].flatten().long()] for image in images]).mean())
