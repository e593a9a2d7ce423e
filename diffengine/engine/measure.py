"""What a run takes of memory and disk, told from its parts. Nothing here waits for a device."""

import math
import resource
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffengine.models.base import Frozen, TrainableModel

ENTRY = 300  # bytes that a checkpoint takes for a tensor beside its values: its name, its shape, its place
CONFIG = 2500  # and for the config


@dataclass
class Memory:
    """Bytes on the device that a run holds all the time, but for the gradients, which go with each step.

    Attributes:
        trained: weights that training changes.
        frozen: all other weights and buffers there: an adapter's base, encoders that are not in a cache.
        gradients: one for each trained weight.
        optimizer: its state.
        average: EMAHook's weights.
    """

    trained: int
    frozen: int
    gradients: int
    optimizer: int
    average: int

    @property
    def total(self) -> int:
        return self.trained + self.frozen + self.gradients + self.optimizer + self.average


def memory_of(model: TrainableModel, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor]) -> Memory:
    """What these hold. The optimizer has its state after its first step.

    Args:
        average: EMAHook's weights; empty where there is none.
    """
    trained = nbytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    return Memory(
        trained=trained,
        frozen=nbytes(weights_of(model)) - trained,
        gradients=trained,
        optimizer=nbytes(tensors_in(optimizer.state)),
        average=nbytes(average.values()),
    )


def weights_of(model: nn.Module) -> list[Tensor]:
    """A model's parameters and buffers, and those of its `Frozen` modules' children on its device."""
    device = next(model.parameters()).device
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    attributes = vars(model).values()
    for item in (one for value in attributes for one in (value.values() if isinstance(value, dict) else [value])):
        if isinstance(item, Frozen):
            there = [name for name, place in item.devices.items() if place == device]
            module: nn.Module | None = item.on(device, there) if there else None  # moves nothing
            for name, child in module.named_children() if module else ():
                if name in there:
                    tensors += [*child.parameters(), *child.buffers()]
    return tensors


def checkpoint_bytes(model: TrainableModel, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor]) -> int:
    """Of one checkpoint on disk, once the optimizer has its state; to 1 %. Arguments as of `memory_of`."""
    tensors = [*model.trained_state().values(), *tensors_in(optimizer.state), *average.values()]
    texts = sum(len(text.encode()) for text in model.assets.values())
    return nbytes(tensors) + ENTRY * len(tensors) + CONFIG + texts


def kept_at_once(every: int | None, keep: int | None, loop: Any) -> int:
    """Checkpoints on the disk at the most: the old one goes after the new one came.

    Args:
        every, keep: of CheckpointHook.
        loop: the run's StepLoop.
    """
    length = loop.max_epochs if loop.by_epoch else loop.max_iters
    written = math.ceil(length / every) if every else 1
    return written if keep is None else min(written, keep + 1)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts and lists; an optimizer may nest its state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Of their values, all together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_bytes() -> int:
    """The most memory taken so far: allocated on the GPU where there is one, else resident of this process.

    A GPU's counter can be reset (`reset_peak`); a process's cannot, so it has start-up and previews in it.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> None:
    """Count a GPU's peak from now on. On the host's side alone: nothing is waited for."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
