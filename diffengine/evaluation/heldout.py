"""The loss on images, at eight fixed shares of masked tokens: equal in every run, on any number of ranks, in any batch.

Legend: N images, h w token grid, L = h * w.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffengine import distributed
from diffengine.datasets import Sample, as_list, collate, generator, same_shape
from diffengine.datasets.stream import VALIDATION
from diffengine.models.masking import BUCKETS, Schedule, num_masked

TIMES = tuple((index + 0.5) / BUCKETS for index in range(BUCKETS))  # the middles of training's buckets


@dataclass(frozen=True)
class FixedImage:
    """A tokenized image with its caption, and the order in which its tokens are masked."""

    sample: Sample  # without image: `token_ids` (h,w), `micro_conds` (5,), `text`
    order_L: np.ndarray  # int64; the masks are its beginnings, so they are nested


class MaskedPredictor(Protocol):
    """What is evaluated: a model in training, or the sampler of a saved one."""

    mask_schedule: Schedule

    def tokenize(self, images: Tensor) -> Mapping[str, Tensor]: ...

    def masked_loss(self, batch: Any) -> tuple[Tensor, Tensor]: ...


def fixed_images(model: MaskedPredictor, samples: Sequence[tuple[Sample, int]], seed: int) -> list[FixedImage]:
    """Tokenize samples; an image's order follows from the seed and the digest of its content, which is given too."""
    images = []
    for sample, digest in samples:
        if "token_ids" not in sample:
            sample = {**sample, **{name: value[0] for name, value in model.tokenize(sample["image"][None]).items()}}
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

    def __add__(self, other: "Losses") -> "Losses":
        return Losses(self.loss + other.loss, self.correct + other.correct, self.tokens + other.tokens)

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


def held_out_losses(
    model: MaskedPredictor, held_out: Sequence[FixedImage], trained: Sequence[FixedImage], batch_size: int,
    on_images: Callable[[int], None] | None = None, sources: Sequence[str] = (),
) -> dict[str, float]:  # fmt: skip
    """What `metrics.jsonl` has of a validation; of held-out images only if there are some, and so of trained ones.

    Args:
        sources: names of the sources of the samples' `source`, for the loss on the held-out images of each.
        on_images: called with the number of images of each forward pass.
    """
    values: dict[str, float] = {}
    if held_out:
        groups = _by_source(held_out)
        by_source = {key: losses(model, group, True, batch_size, on_images) for key, group in groups.items()}
        captioned = reduce(add, by_source.values())
        uncaptioned = losses(model, held_out, False, batch_size, on_images)
        values = {f"val/loss/{sources[key]}": found.mean for key, found in by_source.items() if sources}
        values |= {
            "val/loss": captioned.mean, "val/loss_uncaptioned": uncaptioned.mean,
            "val/caption_gain": uncaptioned.mean - captioned.mean, "val/accuracy": captioned.accuracy,
        }  # fmt: skip
        values |= {f"val/loss_t{number}": loss for number, loss in enumerate(captioned.by_time)}
    if trained:
        values["val/train_loss"] = losses(model, trained, True, batch_size, on_images).mean
    return values


def _by_source(images: Sequence[FixedImage]) -> dict[int, list[FixedImage]]:
    """The images by the number of their source; all as of one if they have none."""
    groups: dict[int, list[FixedImage]] = {}
    for image in images:
        source = image.sample.get("source")
        groups.setdefault(0 if source is None else int(source.argmax()), []).append(image)
    return dict(sorted(groups.items()))


def losses(
    model: MaskedPredictor, images: Sequence[FixedImage], captions: bool, batch_size: int,
    on_images: Callable[[int], None] | None = None,
) -> Losses:  # fmt: skip
    """Evaluate a model on images, with or without their captions. Every rank takes a share, and gets the whole sums."""
    sums = torch.zeros(3, len(TIMES), dtype=torch.float64)
    mine = images[distributed.rank() :: distributed.world_size()]
    found: list[tuple[int, Tensor, Tensor]] = []
    groups = same_shape([image.sample["token_ids"].shape for image in mine])
    batches = [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
    for number, time in enumerate(TIMES):
        for indices in batches:
            chosen = [mine[index] for index in indices]
            batch = collate([_masked(image, time, model.mask_schedule, captions) for image in chosen])
            loss, correct = model.masked_loss(batch)
            found.append((number, loss.double(), correct.double()))
            sums[2, number] += sum(batch["num_targets"])
            if on_images is not None:
                on_images(len(chosen))
    if found:  # one read from the device
        values = torch.stack([torch.stack(pair) for _, *pair in found]).cpu()
        for (number, *_), pair in zip(found, values):
            sums[:2, number] += pair
    return Losses(*torch.tensor(distributed.add_counts(*sums.flatten().tolist()), dtype=torch.float64).view(3, -1))


def _masked(image: FixedImage, time: float, schedule: Schedule, captions: bool) -> Sample:
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
