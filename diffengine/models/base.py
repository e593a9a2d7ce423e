"""The contract between a model and everything that trains, saves, shows or exports it.

A model's frozen parts are held by `Frozen`, so they are no submodules: `train()`, the optimizer, checkpoints,
EMA and DDP never see them. Its submodules are what training changes, under the pipeline's component names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffengine.errors import UserError
from diffengine.models.precision import hold_frozen

Batch = dict[str, Any]
Sample = dict[str, Any]
SampleDraw = Callable[[Sample, np.random.Generator], Sample]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@final
class Frozen(Generic[ModuleT]):
    """A module that training never changes: eval mode, no gradients.

    It is loaded, and moved to a device, when it is first used: a conversion of the transformer alone, or a
    run from cached tokens, never reads the VQ model's weights.
    """

    def __init__(self, load: Callable[[], ModuleT]) -> None:
        self._load = load
        self._module: ModuleT | None = None
        self._dtype: torch.dtype | None = None

    def on(self, device: torch.device, parts: Sequence[str] = ()) -> ModuleT:
        """The module, on `device`: all of it, or only those children that are `parts`."""
        if self._module is None:
            self._module = self._load().eval().requires_grad_(False)
            if self._dtype is not None:
                hold_frozen(self._module, self._dtype)
        for name, child in self._module.named_children():
            if (not parts or name in parts) and _device_of(child) not in (device, None):
                child.to(device)
        return self._module

    def hold(self, dtype: torch.dtype) -> None:
        """From when it is loaded on, keep its weights as `precision.hold_frozen` does."""
        assert self._module is None
        self._dtype = dtype

    @property
    def devices(self) -> dict[str, torch.device | None]:
        """Where each child is; empty while nothing is loaded."""
        children = () if self._module is None else self._module.named_children()
        return {name: _device_of(child) for name, child in children}

    def back(self, devices: Mapping[str, torch.device | None]) -> None:
        """Each child to where it was when `devices` was read; to the host, if it was not loaded."""
        children = () if self._module is None else self._module.named_children()
        for name, child in children:
            child.to(devices.get(name) or "cpu")


def _device_of(module: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in module.parameters()), None)


@contextmanager
def visiting(frozen: Iterable[Frozen]) -> Iterator[None]:
    """Frozen modules that are used inside go back to where they were."""
    before = [(module, module.devices) for module in frozen]
    try:
        yield
    finally:
        for module, devices in before:
            module.back(devices)


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


class NotFinite(UserError):
    """A model whose outputs are infinite or no numbers draws nothing."""


@dataclass
class PreviewRequest:
    """What a preview is asked to show.

    Attributes:
        prompts: captions to draw.
        images: the data's own images for these captions, RGB; empty where the prompts are free text.
        seed: image i draws its noise from a generator of its own, seeded with `seed + i`.
        resolution: side in pixels; None: the model's own.
        options: the model's own drawing options, by name.
    """

    prompts: list[str]
    images: list[Image.Image] = field(default_factory=list)
    seed: int = 0
    resolution: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class LabelledImage:
    """An image with the words that go under it."""

    label: str
    image: Image.Image


class Encoder(ABC):
    """What of images and captions does not change while a model trains, and so can be computed once.

    What it gives is what `prepare` and `forward` would compute of the same images and captions.

    Attributes:
        batch_size: images encoded at once; their outputs may depend on it, in the last bits.
    """

    batch_size: int

    @abstractmethod
    def image_key(self) -> dict[str, str]:
        """Digests of all that `encode_images` depends on, by what to call it: {"VQ model": ...}."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B,3,H,W) in [0,1] as what takes the place of a sample's `image`: on the host, (B,...)."""

    @abstractmethod
    def caption_key(self, embeddings: bool) -> dict[str, str]:
        """As `image_key`, of `encode_captions`."""

    @abstractmethod
    def encode_captions(self, captions: list[str], embeddings: bool) -> dict[str, Tensor]:
        """Captions as what `prepare` makes of them, on the host, (B,...).

        Args:
            embeddings: with the text encoder's outputs, in the autocast around it.
        """

    @property
    @abstractmethod
    def embedding_bytes(self) -> int | None:
        """Of one caption's embeddings; None where they change while training."""

    @abstractmethod
    def to_host(self) -> None:
        """Move the encoders to the host: a run that reads from a cache does not need them on the device."""

    @abstractmethod
    def use_captions(self, lookup: Callable[[str], Mapping[str, np.ndarray] | None]) -> None:
        """From now on take what `encode_captions` gave for a caption, where `lookup` has it."""


class TrainableModel(nn.Module, ABC):
    """What the engine trains. Implementations are final."""

    @classmethod
    @abstractmethod
    def learn_assets(cls, options: Mapping[str, Any], captions: Callable[[], Iterable[str]]) -> dict[str, str]:
        """Small text files learnt from the data before the model is built: a vocabulary.

        Called once per run, on rank 0, since learning may take long or differ; the result is kept in
        the checkpoint and passed to the constructor as `assets`.

        Args:
            options: the config's `model` section.
            captions: gives all captions of the data.
        """

    @property
    @abstractmethod
    def assets(self) -> dict[str, str]:
        """The text files this model was built with, by name."""

    @property
    @abstractmethod
    def sample_draw(self) -> SampleDraw | None:
        """What is drawn or checked per sample, as the data pipeline's last transform; light and picklable."""

    @property
    @abstractmethod
    def encoder(self) -> Encoder | None:
        """What a cache may keep of the samples; None where the model learns from pixels."""

    @abstractmethod
    def caption_lengths(self, captions: Sequence[str]) -> tuple[list[int], int]:
        """How many tokens each caption has; and the most that the model reads of one, 0 if it reads none."""

    @abstractmethod
    def prepare(self, batch: Batch) -> Batch:
        """A collated host batch as `forward` takes it, on the model's device. No gradients, autocast off."""

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One micro-batch.

        Returns:
            The loss *summed* over what is learnt from (`batch["num_targets"]` counts it, on the host), a
            scalar on the device; and detached sums over the same targets to log. Nothing reads the device.
        """

    @abstractmethod
    def compile_blocks(self) -> int:
        """From now on run blocks compiled where gradients are recorded; how many there are, 0 where none.

        Called at most once, before training, with the model on its device. A block is compiled when it first
        runs.
        """

    @abstractmethod
    def hold_frozen(self, dtype: torch.dtype) -> None:
        """Keep frozen weights in `dtype`, that of the autocast around every use, where it changes nothing."""

    @abstractmethod
    def before_step(self, step: int) -> None:
        """Called on every rank before the optimizer's step number `step` (from 0)."""

    @abstractmethod
    def gauges(self) -> dict[str, float]:
        """Values read from the device at a log line that are no sums over targets."""

    @property
    @abstractmethod
    def chance_loss(self) -> tuple[str, float] | None:
        """The loss of a model that knows nothing, with its name: ("ln 8192", 9.01)."""

    @property
    @abstractmethod
    def exportable(self) -> dict[str, nn.Module]:
        """The modules that training changes, by the pipeline's component names."""

    @property
    @abstractmethod
    def sources(self) -> dict[str, Path]:
        """The local folders that components were loaded from, by component: no export overwrites them."""

    @abstractmethod
    def base(self, name: str) -> nn.Module:
        """Component `name` loaded anew, on the host: what its adapter sits on, if it has one."""

    @abstractmethod
    def probe(self, name: str, module: nn.Module) -> Tensor:
        """What `module`, as component `name` on the host, gives for a fixed input: its logits, say.

        Two that give the same are the same component. Eval mode, no gradients; nothing else is loaded.
        """

    @abstractmethod
    def preview(self, request: PreviewRequest) -> list[LabelledImage]:
        """Labelled images of what the model can do now. Touches no global random state.

        Raises:
            NotFinite: there is nothing to show.
        """

    @final
    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside, what `hold_frozen` changed is as it was loaded, on the host, and may be exported."""
        held = []
        try:
            for name, module in self.exportable.items():
                low = {key: value for key, value in module.named_parameters() if value.dtype != torch.float32}
                base = self.base(name).state_dict() if low else {}
                for key, value in low.items():
                    held.append((value, value.data))
                    value.data = base[key.replace(".base_layer", "")]
            yield
        finally:
            for value, data in held:
                value.data = data

    @final
    def trained_state(self) -> dict[str, Tensor]:
        """What training changes, by name: trained parameters and saved buffers."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        buffers = {name for name, _ in self.named_buffers()}
        return {
            name: tensor.detach() for name, tensor in self.state_dict().items() if name in trained or name in buffers
        }

    @final
    def check_trained_state(self, state: Mapping[str, Any], source: str) -> None:
        """Check that `state` is what `trained_state` gives.

        Raises:
            UserError: missing or unexpected names, or shapes or dtypes that differ; `source` says whose.
        """
        own = self.trained_state()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        shapes = [
            f"{name} is {describe(state[name])} where the model has {describe(own[name])}"
            for name in sorted(own.keys() & state.keys())
            if describe(state[name]) != describe(own[name])
        ]
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape or dtype": shapes}
        problems = [
            f"{len(names)} {kind} ({names[0]}{', ...' if len(names) > 1 else ''})"
            for kind, names in kinds.items()
            if names
        ]
        if problems:
            raise UserError(
                f"{source} does not fit this model: weights {'; '.join(problems)}; use the config it was trained with"
            )

    @final
    def load_trained_state(self, state: Mapping[str, Tensor], source: str) -> None:
        """Load what `trained_state` gave, strictly.

        Raises:
            UserError: as `check_trained_state`.
        """
        self.check_trained_state(state, source)
        with torch.no_grad():
            for name, tensor in self.trained_state().items():
                tensor.copy_(state[name])


def describe(value: Any) -> str:
    """A tensor's shape and dtype, "(2, 3) float32"; of anything else its type."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


class MaskedImageModel(TrainableModel):
    """A model of masked image tokens that diffusers' AmusedPipeline can draw with."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """What it was before training, by a name that serves anywhere: the hub's, or a folder's full path."""

    @abstractmethod
    def build_pipeline(self) -> Any:
        """A diffusers pipeline over the live modules: no copy, no network."""
