"""Drawing with an AmusedPipeline, one picture at a time and from generators of its own."""

from typing import Any

import torch
from diffusers import AmusedPipeline
from PIL import Image


def draw(pipeline: AmusedPipeline, prompt: str, seed: int, resolution: int | None = None, **options: Any) -> Image.Image:
    """One picture for a prompt; `options` are AmusedPipeline's.

    Noise comes from a CPU generator with this seed, so a picture is the same on every device and the global
    random state is not touched. One picture is decoded at a time, which bounds the memory of the VQ decoder.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(prompt, height=resolution, width=resolution, generator=generator, **options).images[0]


def draw_strip(
    pipeline: AmusedPipeline, prompt: str, seed: int, resolution: int | None = None, **options: Any
) -> list[Image.Image]:
    """The picture after each drawing step; what is still masked is grey."""
    steps: list[torch.Tensor] = []
    draw(
        pipeline, prompt, seed, resolution, **options,
        callback=lambda step, timestep, latents: steps.append(latents.clone()), output_type="latent",
    )  # fmt: skip
    return [_decode(pipeline, token_ids) for token_ids in steps]


def _decode(pipeline: AmusedPipeline, token_ids: torch.Tensor) -> Image.Image:
    """Token ids (1,h,w), some of them masked, as a picture."""
    masked = token_ids == pipeline.scheduler.config.mask_token_id
    vqvae = pipeline.vqvae
    shape = (*token_ids.shape, vqvae.config.latent_channels)
    pixels = vqvae.decode(token_ids.masked_fill(masked, 0), force_not_quantize=True, shape=shape).sample
    size = [side * pipeline.vae_scale_factor for side in token_ids.shape[1:]]
    hidden = torch.nn.functional.interpolate(masked[:, None].float(), size=size)
    pixels = pixels.clamp(0, 1) * (1 - hidden) + 0.5 * hidden
    return pipeline.image_processor.postprocess(pixels, output_type="pil")[0]
