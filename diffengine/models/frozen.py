"""Modules that training never changes: where they are, in which precision, and temporary modes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar, final

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)
CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)  # whose weights autocast casts at each use


@final
class Frozen(Generic[ModuleT]):
    """A module in eval mode without gradients.

    It is loaded, and moved to a device, when it is first used: a conversion of the transformer alone, or a run that
    reads cached tokens, never reads the VQ model's weights.
    """

    def __init__(self, load: Callable[[], ModuleT]) -> None:
        self._load = load
        self._module: ModuleT | None = None
        self._dtype: torch.dtype | None = None

    def on(self, device: torch.device, children: Sequence[str] = ()) -> ModuleT:
        """The module on `device`: all of it, or only the named children."""
        if self._module is None:
            self._module = self._load().eval().requires_grad_(False)
            if self._dtype is not None:
                hold_in(self._module, self._dtype)
        for name, child in self._module.named_children():
            if (not children or name in children) and _device_of(child) not in (device, None):
                child.to(device)
        return self._module

    def hold(self, dtype: torch.dtype) -> None:
        """Once it is loaded, keep its weights as `hold_in` does."""
        assert self._module is None
        self._dtype = dtype

    def tensors_on(self, device: torch.device) -> list[Tensor]:
        """The parameters and buffers of those children that are on `device`; none while nothing is loaded."""
        children = () if self._module is None else self._module.children()
        there = [child for child in children if _device_of(child) == device]
        return [tensor for child in there for tensor in (*child.parameters(), *child.buffers())]

    @property
    def devices(self) -> dict[str, torch.device | None]:
        """Where each child is; empty while nothing is loaded."""
        children = () if self._module is None else self._module.named_children()
        return {name: _device_of(child) for name, child in children}

    def move_back(self, devices: Mapping[str, torch.device | None]) -> None:
        """Move each child to where it was when `devices` was read; to the host, if it was not loaded."""
        children = () if self._module is None else self._module.named_children()
        for name, child in children:
            child.to(devices.get(name) or "cpu")


def _device_of(module: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in module.parameters()), None)


def hold_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen matrices and kernels of a module in `dtype`, that of the autocast it runs in.

    Autocast would cast them at each use, so the outputs are the same, bit for bit, in half the memory. Norms and
    embeddings, which it does not cast, stay as they are. Outside of autocast the module no longer runs.
    """
    for layer in module.modules():
        if isinstance(layer, CAST):
            for parameter in layer.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


@contextmanager
def restored(frozen: Iterable[Frozen]) -> Iterator[None]:
    """Frozen modules that are used inside move back to where they were."""
    before = [(module, module.devices) for module in frozen]
    try:
        yield
    finally:
        for module, devices in before:
            module.move_back(devices)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; the mode before is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
