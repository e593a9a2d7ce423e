"""Modules that training never changes: their device, their precision, and temporary modes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar, final

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)
CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)  # whose weights autocast casts at each use


@final
class Frozen(Generic[ModuleT]):
    """A module in eval mode without gradients, loaded and moved to a device when it is first used."""

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

    def hold(self, dtype: torch.dtype | None) -> None:
        """Keep its weights as `hold_in` does, from now on or once it is loaded; None: leave them as they are."""
        self._dtype = dtype
        if self._module is not None and dtype is not None:
            hold_in(self._module, dtype)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters; none while nothing is loaded."""
        if self._module is not None:
            yield from self._module.parameters()

    def _children(self) -> dict[str, nn.Module]:
        return {} if self._module is None else dict(self._module.named_children())

    def tensors_on(self, device: torch.device) -> list[Tensor]:
        """The parameters and buffers of those children that are on `device`; none while nothing is loaded."""
        children = [child for child in self._children().values() if _device_of(child) == device]
        return [tensor for child in children for tensor in (*child.parameters(), *child.buffers())]

    @property
    def devices(self) -> dict[str, torch.device | None]:
        """The device of each child; empty while nothing is loaded."""
        return {name: _device_of(child) for name, child in self._children().items()}

    def move_back(self, devices: Mapping[str, torch.device | None]) -> None:
        """Move each child to `devices[name]`, or to the CPU if it is absent."""
        for name, child in self._children().items():
            child.to(devices.get(name) or "cpu")


def _device_of(module: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in module.parameters()), None)


def hold_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen matrices and kernels of a module in `dtype`, that of the autocast it runs in.

    Autocast would cast them at each use, so the outputs are equal, bit for bit, in half the memory. Norms and
    embeddings, which it does not cast, do not change. Outside of autocast the module no longer runs.
    """
    for layer in module.modules():
        if isinstance(layer, CAST):
            for parameter in layer.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def frozen_in(model: nn.Module) -> Iterator["Frozen"]:
    """The frozen modules that a model holds, by themselves or in a dict."""
    for value in vars(model).values():
        items = value.values() if isinstance(value, dict) else [value]
        yield from (item for item in items if isinstance(item, Frozen))


def frozen_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a model and its frozen modules hold and training does not change."""
    own = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return own + [parameter for module in frozen_in(model) for parameter in module.parameters()]


@contextmanager
def restored(frozen: Iterable[Frozen]) -> Iterator[None]:
    """Move frozen modules that are used inside back to their devices."""
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
