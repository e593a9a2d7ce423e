"""How much memory and disk a run takes, computed from its tensors. Nothing here waits for a device."""

import os
import resource
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffengine.models.frozen import frozen_in

ENTRY = 300  # bytes in a checkpoint for a tensor, apart from its values: its name, shape and offset
CONFIG = 3500  # and for the config, whose length changes with a resumed run's options: the estimate must not


def memory_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor], copies: Iterable[Tensor]
) -> dict[str, int]:
    """Bytes on the device by purpose, apart from activations; the optimizer has its state after its first step."""
    device = next(model.parameters()).device
    weights: list[Tensor] = [*model.parameters(), *model.buffers()]
    for item in frozen_in(model):
        weights += item.tensors_on(device)
    trained = nbytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    return {
        "trained": trained,
        "frozen": nbytes(weights) - trained,
        "copies": nbytes(copies),
        "gradients": trained,
        "optimizer": nbytes(tensors_in(optimizer.state)),
        "average": nbytes(average.values()),
    }


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts and lists; an optimizer may nest its state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of all values together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def device_memory() -> int:
    """Bytes of memory that the device has in all."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_bytes() -> int:
    """The most memory allocated on the GPU since `reset_peak`, or resident in this process since its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> None:
    """Start to count a GPU's peak again."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
