"""What is asked of a model that generates images from captions: requests, options, and the sampler that serves them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from diffengine.errors import UserError, require
from diffengine.models.masking import Schedule

Order = Literal["confidence", "halton"]
Unmasking = Literal["cosine", "linear", "arccos"]
Guidance = Literal["constant", "linear"]
LARGEST = 10**6  # guidance scale or temperature; beyond it fp16 and fp32 overflow


class NotFinite(UserError):
    """A model's outputs are infinite or NaN, so it generates nothing."""


@dataclass(frozen=True)
class ImageRequest:
    """One image to generate.

    Attributes:
        prompt: the caption.
        seed: of the image's noise; the image does not depend on what else is generated with it.
        negative_prompt: what guidance leads away from.
        image: an RGB image to start from.
        mask: white where `image` is generated again, black where it is kept; of any size and mode.
        strength: in (0, 1], the share of the steps that are taken: 1 keeps nothing of `image`, except where `mask`
            does. None: 0.5, or 1 with a mask.
        size: (width, height) in pixels; None for that of `image`, else the model's own.
    """

    prompt: str
    seed: int = 0
    negative_prompt: str = ""
    image: Image.Image | None = None
    mask: Image.Image | None = None
    strength: float | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class GenerationOptions:
    """How images are generated.

    Attributes:
        guidance_scale: logits are `uncond + scale * (cond - uncond)`; at most 1: no guidance, half the time. None: the
            model's own.
        num_inference_steps: forward passes of the transformer.
        temperature: of the noise on confidences, at the first and the last step; one number t stands for (t, 0.01).
        guidance_schedule: "constant", or "linear": the scale rises from 1 at the first step to its value at the last,
            as in Muse (arXiv 2301.00704).
        guidance_interval: the steps that are guided, as shares of all: (0.0, 0.5) is the first half. Guidance in an
            interval: arXiv 2404.07724.
        masking_schedule: share of tokens that are masked after a share r of the steps: "cosine" cos(pi r / 2),
            "linear" 1 - r, "arccos" arccos(r) / (pi / 2) (MaskGIT, arXiv 2202.04200). None: the model's own, and linear
            if there is a mask.
        order: "confidence" keeps the tokens with the highest probability, with noise; "halton" keeps a fixed order of
            positions that spreads evenly over the image (arXiv 2503.17076).
        exact: take the noise from the CPU, so a GPU generates the CPU's images to rounding; slower on a GPU.
    """

    guidance_scale: float | None = None
    num_inference_steps: int = 12
    temperature: float | tuple[float, float] = (2.0, 0.0)
    guidance_schedule: Guidance = "constant"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    masking_schedule: Unmasking | None = None
    order: Order = "confidence"
    exact: bool = False

    def __post_init__(self) -> None:
        steps, scale, interval = self.num_inference_steps, self.guidance_scale, tuple(self.guidance_interval)
        require(isinstance(steps, int) and steps >= 1, f"num_inference_steps got {steps}; expected at least 1")
        fine = scale is None or 0 <= scale <= LARGEST
        require(fine, f"guidance_scale got {scale}; expected a number from 0 to {LARGEST:,}; 1 is without guidance")
        ends = self._temperature_ends
        fine = len(ends) == 2 and all(isinstance(end, int | float) and 0 <= end <= LARGEST for end in ends)
        require(fine, f"temperature got {self.temperature}; expected a number from 0, or two, {LARGEST:,} at most")
        fine = len(interval) == 2 and 0 <= interval[0] < interval[1] <= 1
        require(fine, f"guidance_interval got {interval}; expected two rising numbers in [0, 1]")
        for name, known in (("order", Order), ("guidance_schedule", Guidance), ("masking_schedule", Unmasking)):
            value, choices = getattr(self, name), known.__args__  # type: ignore[attr-defined]
            fine = value in choices or (value is None and name == "masking_schedule")
            require(fine, f"{name} got {value!r}; expected one of {', '.join(choices)}")

    @property
    def temperatures(self) -> Tensor:
        """The temperature of each step, (steps,) fp32, computed as AmusedScheduler computes it."""
        return torch.linspace(*self._temperature_ends, self.num_inference_steps)

    @property
    def _temperature_ends(self) -> tuple[float, ...]:
        return tuple(self.temperature) if isinstance(self.temperature, tuple | list) else (self.temperature, 0.01)

    def or_guided_by(self, scale: float) -> "GenerationOptions":
        """These options, with a guidance scale if they leave it to the model."""
        return self if self.guidance_scale is not None else replace(self, guidance_scale=scale)

    def guidance_at(self, step: int) -> float:
        """The guidance scale of a step; 1.0 for a step without guidance."""
        assert self.guidance_scale is not None
        steps, (first, last) = self.num_inference_steps, self.guidance_interval
        if self.guidance_scale <= 1 or not first <= step / steps < last:
            return 1.0
        share = step / (steps - 1) if self.guidance_schedule == "linear" and steps > 1 else 1.0
        return 1.0 + (self.guidance_scale - 1.0) * share if share < 1 else float(self.guidance_scale)


class ImageSampler(ABC):
    """Generates images. It holds a model's modules, which are not copied."""

    guidance_scale: float  # what suits the model
    side: int  # of the model's own images, in pixels
    size_multiple: int  # by which the sides of any must be divisible
    num_codes: int  # that a token can have
    mask_schedule: Schedule  # the share of tokens that are masked by t, in training

    @abstractmethod
    def generate(
        self,
        requests: Sequence[ImageRequest],
        options: GenerationOptions | None = None,
        size: tuple[int, int] | None = None,
        batch_size: int | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[Image.Image]:
        """Check all requests, then yield an RGB image for each, in order, a batch at a time.

        Args:
            options: None for the defaults.
            size: (width, height) in pixels of all images; None for each request's own.
            batch_size: images generated at once; None for one that suits the device. Images do not depend on it.
            on_step: called after each step, with the number of images that took it.

        Raises:
            UserError: a size or an option that the model cannot generate with; or `NotFinite`.
        """

    @abstractmethod
    def generate_steps(
        self, request: ImageRequest, options: GenerationOptions | None = None, size: tuple[int, int] | None = None
    ) -> list[Image.Image]:
        """The image of a request after each step; tokens that are still masked are grey."""

    @abstractmethod
    def reconstruct(self, images: Sequence[Image.Image]) -> Iterator[Image.Image]:
        """Yield each image after its round trip through the tokens: the best that can be generated."""

    @abstractmethod
    def tokenize(self, images: Tensor) -> Mapping[str, Tensor]:
        """Images (B,3,H,W) in [0,1] as `token_ids` (B,h,w), on the host."""

    @abstractmethod
    def masked_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """What the model was trained to lower: see `MaskedImageModel.masked_loss`."""

    @abstractmethod
    def cut(self, prompt: str) -> str:
        """What a model does not read of a prompt that is too long, "" for nothing."""

    @abstractmethod
    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "ImageSampler":
        """Move the modules to a device; in `dtype`, all but the VQ model."""

    @abstractmethod
    def compile(self) -> None:
        """Compile the blocks with torch.compile: faster for many images, after some minutes at the start."""
