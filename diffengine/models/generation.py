"""Generating with an AmusedPipeline, one image at a time, each with its own random generator; h w: token grid."""

from typing import Any

import torch
from diffusers import AmusedPipeline
from PIL.Image import Image
from torch import Tensor, nn

from diffengine.models.base import NotFinite
from diffengine.models.masking import TokenGrid


def generate(pipeline: AmusedPipeline, prompt: str, seed: int, resolution: int | None = None, **options: Any) -> Image:
    """One image for a prompt, as `pipeline(prompt, ...)` generates it.

    Noise comes from a CPU generator with this seed; the global random state is left alone. The VQ decoder runs in fp32
    whatever the autocast, since its fp16 makes NaN.

    Args:
        resolution: side in pixels; None for the model's own.
        options: AmusedPipeline's.

    Raises:
        UserError: the model cannot generate this resolution; or `NotFinite`.
    """
    return _decode(pipeline, _tokens(pipeline, prompt, seed, resolution, options))


def generate_steps(
    pipeline: AmusedPipeline, prompt: str, seed: int, resolution: int | None = None, **options: Any
) -> list[Image]:
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


def _tokens(pipeline: AmusedPipeline, prompt: str, seed: int, resolution: int | None, options: dict) -> Tensor:
    """Token ids (1,h,w) int64 after the last step: none is masked."""
    if resolution is not None:
        token_grid(pipeline.vqvae.config, pipeline.transformer.config).sides(resolution, resolution)

    def refuse_broken(module: nn.Module, arguments: Any, logits: Tensor) -> None:
        if not torch.isfinite(logits).all():  # torch's own error is unclear, and on a GPU it ends the process
            advice = "train with a lower learning rate, or generate in bf16 or fp32"
            raise NotFinite(f"the model's outputs are not finite, so it generates nothing; {advice}")

    options = {**options, "height": resolution, "width": resolution, "output_type": "latent"}
    handle = pipeline.transformer.register_forward_hook(refuse_broken)
    try:
        return pipeline(prompt, generator=torch.Generator("cpu").manual_seed(seed), **options).images
    finally:
        handle.remove()


@torch.no_grad()
def _decode(pipeline: AmusedPipeline, token_ids: Tensor) -> Image:
    """Token ids (1,h,w), some of them perhaps masked, as an image."""
    masked = token_ids == pipeline.scheduler.config.mask_token_id
    shape = (*token_ids.shape, pipeline.vqvae.config.latent_channels)
    with torch.autocast(token_ids.device.type, enabled=False):
        pixels = pipeline.vqvae.decode(token_ids.masked_fill(masked, 0), force_not_quantize=True, shape=shape).sample
    size = [side * pipeline.vae_scale_factor for side in token_ids.shape[1:]]
    hidden = torch.nn.functional.interpolate(masked[:, None].float(), size=size)
    pixels = pixels.clamp(0, 1) * (1 - hidden) + 0.5 * hidden
    return pipeline.image_processor.postprocess(pixels, output_type="pil")[0]
