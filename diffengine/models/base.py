"""The contract between a model and everything that trains, saves, shows or exports it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffengine.errors import UserError, require
from diffengine.models.generation import ImageSampler
from diffengine.models.masking import Schedule

Batch = dict[str, Any]
Sample = dict[str, Any]
SampleTransform = Callable[[Sample, np.random.Generator], Sample]


class TrainableModel(nn.Module, ABC):
    """What the engine trains. A subclass implements the five abstract members; all else has defaults.

    Its submodules are what training changes, under the pipeline's component names. `Frozen` (frozen.py) holds frozen
    modules, so `train()`, the optimizer, checkpoints, EMA and DDP never see them. The engine builds a model by
    `cls(**options, assets=..., seed=...)`. Subclasses are final.

    Attributes:
        size_multiple: by which the sides of its images must be divisible, in pixels.
    """

    size_multiple: int = 1

    @abstractmethod
    def prepare(self, batch: Batch) -> Batch:
        """Turn a collated host batch into `forward`'s, on the model's device. Runs without gradients or autocast."""

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of one micro-batch, without reading from the device.

        Returns:
            The loss *summed* over the targets (`batch["num_targets"]` of them), a scalar; and detached sums to log:
            scalars over all targets, or vectors with one sum for each `bucket` of the samples. "loss_t" is logged as
            loss_t0 for bucket 0, and so on, each divided by the targets of its bucket. If samples have a `source`,
            "loss_by_source" may have the loss of each.
        """

    @abstractmethod
    def base(self, name: str) -> nn.Module:
        """Load component `name` again, on the host, without training and without an adapter."""

    @abstractmethod
    def probe(self, name: str, module: nn.Module) -> Tensor:
        """Run `module`, as component `name` on the host, on a fixed input; equal components give equal outputs."""

    @abstractmethod
    def preview(self, request: "PreviewRequest") -> list["LabelledImage"]:
        """Show what the model can do now, without global random state; raises NotFinite for broken outputs."""

    @property
    def exportable(self) -> dict[str, nn.Module]:
        """The modules that training changes, by the pipeline's component names."""
        return dict(self.named_children())

    @classmethod
    def learn_assets(cls, options: Mapping[str, Any], captions: Callable[[], Iterable[str]]) -> dict[str, str]:
        """Learn text files, such as a vocabulary, from all captions, on rank 0; `options` are the `model` section."""
        return {}

    @property
    def assets(self) -> dict[str, str]:
        """The text files that the model was built with, by name."""
        return {}

    @property
    def sample_transform(self) -> SampleTransform | None:
        """The data pipeline's last transform, for what the model draws or checks per sample; small and picklable."""
        return None

    @property
    def encoder(self) -> "Encoder | None":
        """What a cache uses to encode samples; None if the model learns from pixels."""
        return None

    def caption_lengths(self, captions: Sequence[str]) -> tuple[list[int], int]:
        """The number of tokens of each caption, and the most that the model reads (0: it reads no captions)."""
        return [0] * len(captions), 0

    def before_step(self, step: int) -> None:
        """Called on every rank before optimizer step number `step` (from 0)."""

    def after_passes(self) -> None:
        """Called on every rank after the last backward pass of an optimizer step, before weights change."""

    def extra_metrics(self) -> dict[str, float]:
        """Values to log that are not sums over targets; reads from the device, at log lines only."""
        return {}

    @property
    def chance_loss(self) -> tuple[str, float] | None:
        """The loss of an untrained model, with its name: ("ln 8192", 9.01)."""
        return None

    def gradient_group(self, name: str) -> str:
        """The group, of few, in which the gradient of parameter `name` is logged; by default its component's name."""
        return name.partition(".")[0]

    def compile_blocks(self) -> int:
        """Run blocks compiled from now on when gradients are recorded; returns how many there are."""
        return 0

    def hold_frozen(self, dtype: torch.dtype) -> None:
        """Keep frozen weights in `dtype`, the autocast's, if that leaves the outputs unchanged."""

    @property
    def sources(self) -> dict[str, Path]:
        """The local folders that components were loaded from, by component; no export overwrites them."""
        return {}

    @final
    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside, weights that `hold_frozen` changed have their loaded values, on the host, and may be exported."""
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
        """Raise a UserError that names `source` unless `state` has the names, shapes and dtypes of `trained_state`."""
        own, problems = self.trained_state(), []
        for name in sorted(own.keys() | state.keys()):
            got, expected = (describe(tensors[name]) if name in tensors else "absent" for tensors in (state, own))
            if got != expected:
                problems.append(f"{name} is {got}, expected {expected}")
        differ = f"{len(problems)} weights differ ({'; '.join(problems[:3])}{'; ...' if problems[3:] else ''})"
        require(not problems, f"{source} does not fit this model: {differ}; use the config it was trained with")

    @final
    def load_trained_state(self, state: Mapping[str, Tensor], source: str) -> None:
        """Load what `trained_state` returned, after `check_trained_state`."""
        self.check_trained_state(state, source)
        with torch.no_grad():
            for name, tensor in self.trained_state().items():
                tensor.copy_(state[name])


class MaskedImageModel(TrainableModel):
    """A model that generates images from captions, token by token.

    Attributes:
        guidance_scale: what suits how it was trained; None for what suits its size.
        pipeline_class: the diffusers pipeline that opens an export.
        mask_schedule: the share of tokens that are masked by t, see `masking.num_masked`.
        num_codes: codes that a token can have.
        side: of the images that it was made for, in pixels.
    """

    mask_schedule: Schedule
    num_codes: int
    side: int

    guidance_scale: float | None = None
    pipeline_class = "AmusedPipeline"

    @final
    def tokenize(self, images: Tensor) -> Mapping[str, Tensor]:
        """Images (B,3,H,W) in [0,1] as `token_ids` (B,h,w), on the host."""
        assert self.encoder is not None
        return self.encoder.encode_images(images)

    @final
    def masked_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed cross entropy of a collated batch's masked tokens, and how many of them the model gets right."""
        loss, logs = self(self.prepare(batch))
        return loss, logs["accuracy"]

    @property
    @abstractmethod
    def origin(self) -> str:
        """The model before training, by a name that is valid anywhere: a hub name or a folder's absolute path."""

    @abstractmethod
    def sampler(self) -> ImageSampler:
        """What generates images with the live modules, which are not copied."""

    @property
    @abstractmethod
    def pipeline_components(self) -> dict[str, Any]:
        """What `pipeline_class` is made of, by its names: the live modules, a tokenizer, a scheduler."""

    @final
    def build_pipeline(self) -> Any:
        """A diffusers pipeline over the live modules, which are not copied.

        Raises:
            UserError: the installed diffusers no longer has it.
        """
        try:
            cls = getattr(diffusers, self.pipeline_class)
        except (ImportError, RuntimeError, AttributeError) as error:
            advice = "generate with `diffengine sample`"
            raise UserError(f"diffusers {diffusers.__version__} has no {self.pipeline_class}; {advice}") from error
        pipeline = cls(**self.pipeline_components)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


class Encoder(ABC):
    """A model's frozen encoders, whose outputs a cache can keep: those that `prepare` and `forward` compute."""

    batch_size: int  # images encoded at once; the last bits of the outputs may depend on it

    @abstractmethod
    def image_key(self) -> dict[str, str]:
        """Digests of everything that `encode_images` depends on, by name: {"VQ model": ...}."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> dict[str, Tensor]:
        """Encode images (B,3,H,W) in [0,1] to what replaces `image` in a sample, (B,...) on the host."""

    @abstractmethod
    def caption_key(self, embeddings: bool) -> dict[str, str]:
        """Digests of everything that `encode_captions` depends on, by name."""

    @abstractmethod
    def encode_captions(self, captions: list[str], embeddings: bool) -> dict[str, Tensor]:
        """Encode captions to ids or, with `embeddings`, to the text encoder's outputs, (B,...) on the host."""

    @property
    @abstractmethod
    def embedding_bytes(self) -> int | None:
        """Bytes of one caption's embeddings; None if training changes them."""

    @abstractmethod
    def to_host(self) -> None:
        """Move the encoders to the host, for a run that reads from a cache."""

    @abstractmethod
    def use_captions(self, lookup: Callable[[str], Mapping[str, np.ndarray] | None]) -> None:
        """From now on use what `lookup` has for a caption: the arrays of `encode_captions`, or None."""


@dataclass
class PreviewRequest:
    """What a preview shows.

    Attributes:
        prompts: captions to generate from.
        images: the data's RGB images with these captions; empty if the prompts are free text.
        seed: image i takes its noise from a generator seeded with `seed + i`.
        sizes: (width, height) in pixels for each prompt; empty for the model's own.
        options: generation options of the model, by name.
    """

    prompts: list[str]
    images: list[Image.Image] = field(default_factory=list)
    seed: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class LabelledImage:
    """An image and its caption."""

    label: str
    image: Image.Image


def describe(value: Any) -> str:
    """A tensor's shape and dtype, such as "(2, 3) float32"; the type of any other value."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__
