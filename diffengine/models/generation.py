"""Generating with an AmusedPipeline, one image at a time and from its own generator.

Legend: h w token grid, f pixels per token.
"""

from typing import Any

import torch
from diffusers import AmusedPipeline
from PIL import Image
from torch import Tensor, nn

from diffengine.models.base import NotFinite
from diffengine.models.masking import TokenGrid


def generate(
    pipeline: AmusedPipeline, prompt: str, seed: int, resolution: int | None = None, **options: Any
) -> Image.Image:
    """One image for a prompt, as `pipeline(prompt, ...)` generates it.

    Noise comes from a CPU generator with this seed, so the global random state is not touched. One image is decoded at
    a
    time, which bounds the memory of the VQ decoder, and in fp32 whatever the autocast: in fp16 it makes NaN.

    Args:
        resolution: side in pixels; None: the model's own.
        options: AmusedPipeline's.

    Raises:
        UserError: a resolution that the model cannot generate; or `NotFinite`.
    """
    return _decode(pipeline, _tokens(pipeline, prompt, seed, resolution, options))


def generate_steps(
    pipeline: AmusedPipeline, prompt: str, seed: int, resolution: int | None = None, **options: Any
) -> list[Image.Image]:
    """The image of `generate` after each of its steps; tokens that are still masked are grey."""
    steps: list[Tensor] = []

    def keep(step: int, timestep: int, token_ids: Tensor) -> None:
        steps.append(token_ids.clone())

    _tokens(pipeline, prompt, seed, resolution, {**options, "callback": keep})
    return [_decode(pipeline, token_ids) for token_ids in steps]


def token_grid(vqvae_config: Any, transformer_config: Any) -> TokenGrid:
    """The token grid of a model, from the configs of its VQ model and transformer."""
    factor = 2 ** (len(vqvae_config["block_out_channels"]) - 1)
    return TokenGrid(factor, 2 if transformer_config["downsample"] else 1)


def _tokens(
    pipeline: AmusedPipeline, prompt: str, seed: int, resolution: int | None, options: dict[str, Any]
) -> Tensor:
    """Token ids (1,h,w) int64 after the last step: none is masked."""
    if resolution is not None:
        token_grid(pipeline.vqvae.config, pipeline.transformer.config).sides(resolution, resolution)
    generator = torch.Generator("cpu").manual_seed(seed)
    handle = pipeline.transformer.register_forward_hook(_refuse_broken)
    try:
        return pipeline(
            prompt, height=resolution, width=resolution, generator=generator, output_type="latent", **options
        ).images
    finally:
        handle.remove()


def _refuse_broken(module: nn.Module, arguments: Any, logits: Tensor) -> None:
    """Refuse logits that are not finite: torch's own error is unclear, and on a GPU it ends the process."""
    if not torch.isfinite(logits).all():
        raise NotFinite(
            "the model's outputs are not finite, so it generates nothing; train with a lower learning rate, or "
            "generate in bf16 or fp32"
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
