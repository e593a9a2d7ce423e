"""The contract between a model and everything that trains, saves, shows or exports it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffengine.errors import UserError

Batch = dict[str, Any]
Sample = dict[str, Any]
SampleTransform = Callable[[Sample, np.random.Generator], Sample]


class TrainableModel(nn.Module, ABC):
    """What the engine trains. A subclass implements the six abstract members; all else has defaults.

    Its registered submodules are what training changes, under the pipeline's component names. Frozen modules are held
    by `Frozen` (frozen.py), so they are not submodules: `train()`, the optimizer, checkpoints, EMA and DDP never see
    them. It is built by `cls(**options, assets=..., seed=...)`. Subclasses are final.
    """

    @abstractmethod
    def prepare(self, batch: Batch) -> Batch:
        """A collated host batch as `forward` takes it, on the model's device. Runs without gradients or autocast."""

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One micro-batch.

        Returns:
            The loss *summed* over its targets (`batch["num_targets"]` counts them, on the host), a scalar on the
            device; and detached sums over the same targets to log. Nothing reads the device.
        """

    @property
    @abstractmethod
    def exportable(self) -> dict[str, nn.Module]:
        """The modules that training changes, by the pipeline's component names."""

    @abstractmethod
    def base(self, name: str) -> nn.Module:
        """Component `name` loaded again, on the host, as it was before training and without an adapter."""

    @abstractmethod
    def probe(self, name: str, module: nn.Module) -> Tensor:
        """The outputs of `module`, as component `name` on the host, for a fixed input: equal for equal components."""

    @abstractmethod
    def preview(self, request: "PreviewRequest") -> list["LabelledImage"]:
        """Labelled images of what the model can do now. Touches no global random state.

        Raises:
            NotFinite: there is nothing to show.
        """

    # ------------------------------------------------------------------------- defaults for a model with nothing
    # special

    @classmethod
    def learn_assets(cls, options: Mapping[str, Any], captions: Callable[[], Iterable[str]]) -> dict[str, str]:
        """Small text files learnt from the data before the model is built, such as a vocabulary. Called on rank 0.

        Args:
            options: the config's `model` section.
            captions: returns all captions of the data.
        """
        return {}

    @property
    def assets(self) -> dict[str, str]:
        """The text files that the model was built with, by name."""
        return {}

    @property
    def sample_transform(self) -> SampleTransform | None:
        """What is drawn or checked per sample, as the data pipeline's last transform; light and picklable."""
        return None

    @property
    def encoder(self) -> "Encoder | None":
        """What a cache may keep of the samples; None if the model learns from pixels."""
        return None

    def caption_lengths(self, captions: Sequence[str]) -> tuple[list[int], int]:
        """The number of tokens of each caption, and the most that the model reads of one (0: it reads none)."""
        return [0] * len(captions), 0

    def before_step(self, step: int) -> None:
        """Called on every rank before optimizer step number `step` (from 0)."""

    def extra_metrics(self) -> dict[str, float]:
        """Values read from the device at a log line that are no sums over targets."""
        return {}

    @property
    def chance_loss(self) -> tuple[str, float] | None:
        """The loss of a model that knows nothing, with its name: ("ln 8192", 9.01)."""
        return None

    def compile_blocks(self) -> int:
        """Run blocks compiled from now on when gradients are recorded; returns how many (0: it has no blocks)."""
        return 0

    def hold_frozen(self, dtype: torch.dtype) -> None:
        """Keep frozen weights in `dtype`, that of the autocast around every use, where it changes nothing."""

    @property
    def sources(self) -> dict[str, Path]:
        """The local folders that components were loaded from, by component: no export overwrites them."""
        return {}

    # ------------------------------------------------------------------------------------------- the same for all
    # models

    @final
    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside, weights that `hold_frozen` changed are as they were loaded, on the host, and may be exported."""
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
        trained |= {name for name, _ in self.named_buffers()}
        return {name: tensor.detach() for name, tensor in self.state_dict().items() if name in trained}

    @final
    def check_trained_state(self, state: Mapping[str, Any], source: str) -> None:
        """Check that `state` is what `trained_state` returns.

        Raises:
            UserError: missing or unexpected names, or shapes or dtypes that differ; `source` says whose.
        """
        own = self.trained_state()
        problems = {
            "missing": sorted(own.keys() - state.keys()),
            "unexpected": sorted(state.keys() - own.keys()),
            "of another shape or dtype": [
                f"{name} is {describe(state[name])} where the model has {describe(own[name])}"
                for name in sorted(own.keys() & state.keys())
                if describe(state[name]) != describe(own[name])
            ],
        }
        if any(problems.values()):
            lines = [
                f"{len(names)} {problem} ({names[0]}{', ...' if len(names) > 1 else ''})"
                for problem, names in problems.items()
                if names
            ]
            raise UserError(
                f"{source} does not fit this model: weights {'; '.join(lines)}; use the config it was trained with"
            )

    @final
    def load_trained_state(self, state: Mapping[str, Tensor], source: str) -> None:
        """Load what `trained_state` returned, strictly.

        Raises:
            UserError: as `check_trained_state`.
        """
        self.check_trained_state(state, source)
        with torch.no_grad():
            for name, tensor in self.trained_state().items():
                tensor.copy_(state[name])


class MaskedImageModel(TrainableModel):
    """A model of masked image tokens from which diffusers' AmusedPipeline can generate."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """What it was before training, by a name that is valid anywhere: the hub's, or a folder's full path."""

    @abstractmethod
    def build_pipeline(self) -> Any:
        """A diffusers pipeline over the live modules: no copy, no network."""


class Encoder(ABC):
    """A model's frozen encoders: their outputs for an image or a caption never change, so a cache can keep them.

    The outputs are what `prepare` and `forward` would compute.

    Attributes:
        batch_size: images encoded at once; the last bits of the outputs may depend on it.
    """

    batch_size: int

    @abstractmethod
    def image_key(self) -> dict[str, str]:
        """Digests of everything that `encode_images` depends on, by name: {"VQ model": ...}."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> dict[str, Tensor]:
        """What replaces a sample's `image`, on the host, (B,...), for images (B,3,H,W) in [0,1]."""

    @abstractmethod
    def caption_key(self, embeddings: bool) -> dict[str, str]:
        """As `image_key`, of `encode_captions`."""

    @abstractmethod
    def encode_captions(self, captions: list[str], embeddings: bool) -> dict[str, Tensor]:
        """What `prepare` makes of captions, on the host, (B,...); with `embeddings`, the text encoder's outputs."""

    @property
    @abstractmethod
    def embedding_bytes(self) -> int | None:
        """Bytes of one caption's embeddings; None if they change while training."""

    @abstractmethod
    def to_host(self) -> None:
        """Move the encoders to the host: a run that reads from a cache does not need them on the device."""

    @abstractmethod
    def use_captions(self, lookup: Callable[[str], Mapping[str, np.ndarray] | None]) -> None:
        """From now on use what `encode_captions` returned for a caption, if `lookup` has it."""


class NotFinite(UserError):
    """A model whose outputs are infinite or NaN generates nothing."""


@dataclass
class PreviewRequest:
    """What a preview is asked to show.

    Attributes:
        prompts: captions to generate from.
        images: the data's own images for these captions, RGB; empty if the prompts are free text.
        seed: image i takes its noise from a generator seeded with `seed + i`.
        resolution: side in pixels; None: the model's own.
        options: the model's own generation options, by name.
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


def describe(value: Any) -> str:
    """A tensor's shape and dtype, "(2, 3) float32"; of anything else its type."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__
