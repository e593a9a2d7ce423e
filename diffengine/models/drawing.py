"""Drawing with an AmusedPipeline, one image at a time and from generators of its own.

Legend: h w token grid, f pixels per token.
"""

from typing import Any

import torch
from diffusers import AmusedPipeline
from PIL import Image
from torch import Tensor, nn

from diffengine.models.base import NotFinite
from diffengine.models.masking import CheckSides


def draw(
    pipeline: AmusedPipeline, prompt: str, seed: int, resolution: int | None = None, **options: Any
) -> Image.Image:
    """One image for a prompt, as `pipeline(prompt, ...)` draws it.

    Noise comes from a CPU generator with this seed, so the global random state is not touched. One image is
    decoded at a time, which bounds the memory of the VQ decoder, and in the decoder's own precision whatever
    the autocast around it: in fp16 it makes NaN.

    Args:
        resolution: side in pixels; None: the model's own.
        options: AmusedPipeline's.

    Raises:
        UserError: a resolution that the model cannot draw; or `NotFinite`.
    """
    return _decode(pipeline, _tokens(pipeline, prompt, seed, resolution, options))


def draw_strip(
    pipeline: AmusedPipeline, prompt: str, seed: int, resolution: int | None = None, **options: Any
) -> list[Image.Image]:
    """The image of `draw` after each of its steps; what is still masked is grey."""
    steps: list[Tensor] = []

    def keep(step: int, timestep: int, token_ids: Tensor) -> None:
        steps.append(token_ids.clone())

    _tokens(pipeline, prompt, seed, resolution, {**options, "callback": keep})
    return [_decode(pipeline, token_ids) for token_ids in steps]


def sides_of(vqvae_config: Any, transformer_config: Any) -> CheckSides:
    """What a model asks of an image's sides, by the configs of its VQ model and transformer."""
    factor = 2 ** (len(vqvae_config["block_out_channels"]) - 1)
    return CheckSides(factor, 2 if transformer_config["downsample"] else 1)


def _tokens(
    pipeline: AmusedPipeline, prompt: str, seed: int, resolution: int | None, options: dict[str, Any]
) -> Tensor:
    """Token ids (1,h,w) int64, as the last step leaves them: none masked."""
    if resolution is not None:
        sides_of(pipeline.vqvae.config, pipeline.transformer.config).grid(resolution, resolution)
    generator = torch.Generator("cpu").manual_seed(seed)
    handle = pipeline.transformer.register_forward_hook(_refuse_broken)
    try:
        return pipeline(
            prompt, height=resolution, width=resolution, generator=generator, output_type="latent", **options
        ).images
    finally:
        handle.remove()


def _refuse_broken(module: nn.Module, arguments: Any, logits: Tensor) -> None:
    """From what is no number no token is drawn: torch would say so without clear words, and a GPU be lost."""
    if not torch.isfinite(logits).all():
        raise NotFinite(
            "the model's outputs are not finite, so it draws nothing; train with a lower learning rate, or "
            "draw in bf16 or fp32"
        )


@torch.no_grad()
def _decode(pipeline: AmusedPipeline, token_ids: Tensor) -> Image.Image:
    """Token ids (1,h,w), some of them perhaps masked, as an image."""
    masked = token_ids == pipeline.scheduler.config.mask_token_id
    vqvae = pipeline.vqvae
    shape = (*token_ids.shape, vqvae.config.latent_channels)
    with torch.autocast(token_ids.device.type, enabled=False):
        pixels = vqvae.decode(token_ids.masked_fill(masked, 0), force_not_quantize=True, shape=shape).sample
    size = [side * pipeline.vae_scale_factor for side in token_ids.shape[1:]]
    hidden = torch.nn.functional.interpolate(masked[:, None].float(), size=size)
    pixels = pixels.clamp(0, 1) * (1 - hidden) + 0.5 * hidden
    return pipeline.image_processor.postprocess(pixels, output_type="pil")[0]
