"""Trained weights in the precision of autocast, cast once per optimizer step.

Autocast casts a weight at each use: in each micro-batch, and again in the backward pass of a checkpointed block. Each
cast takes new memory, which takes a CPU longer than the cast itself. Here all weights are cast by one call into memory
that stays, and layers read the copies while a step's passes run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from diffengine.models.frozen import CAST

Slot = tuple[nn.Module, str, nn.Parameter]  # a layer, and the name and value of one of its parameters


class _Copy(torch.autograd.Function):
    """The copy of a weight as if it were cast here: its gradient is the weight's, cast back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0].to(ctx.dtype), None


@final
class Copies:
    """Copies of the weights that autocast would cast, of components of which every weight is trained.

    An adapter's weights are few, and peft reads their dtype: its components have none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._slots = [slot for child in model.children() for slot in _slots(child)]
        self._copies: list[Tensor] = []

    @property
    def tensors(self) -> list[Tensor]:
        """The copies; none before they are first used."""
        return self._copies

    @property
    def weights(self) -> int:
        """How many numbers have a copy once they are used."""
        return sum(weight.numel() for *_, weight in self._slots)

    @contextmanager
    def used(self, dtype: torch.dtype) -> Iterator[None]:
        """Inside, layers compute with their weights as these are now, cast to `dtype`. Weights must not change."""
        weights = [weight for *_, weight in self._slots]
        if not self._copies:
            self._copies = [torch.empty_like(weight, dtype=dtype, requires_grad=False) for weight in weights]
        if weights:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, weights)
        try:
            for (layer, name, weight), copy in zip(self._slots, self._copies):
                vars(layer)[name] = _Copy.apply(weight, copy)  # found before the parameter, which stays registered
            yield
        finally:
            for layer, name, _ in self._slots:
                vars(layer).pop(name, None)

    def free(self) -> None:
        """Give the memory back."""
        self._copies = []


def _slots(component: nn.Module) -> list[Slot]:
    """The fp32 parameters of a component that autocast casts; none if any of its parameters is frozen."""
    if not all(parameter.requires_grad for parameter in component.parameters()):
        return []
    return [
        (layer, name, parameter)
        for layer in component.modules()
        if isinstance(layer, CAST)
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter.dtype == torch.float32
    ]
