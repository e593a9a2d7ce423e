"""Generate an image for every caption of the emoji data with an exported pipeline, and score the images.

    python tools/emoji_demo.py PIPELINE_FOLDER OUT_FOLDER

retrieval@1: the share of generated images whose nearest original, in L2 distance over pixels, is the one with the same
caption. The scores depend only on the images that the exported pipeline generates.
"""

import argparse
import time
from itertools import chain
from pathlib import Path

from diffengine import api, config  # before diffusers: it silences the libraries that diffusers imports

# isort: split
import numpy as np
import torch
from diffusers import AmusedInpaintPipeline, AmusedPipeline, AmusedScheduler
from PIL import Image, ImageDraw

from diffengine.datasets import EmojiDataset
from diffengine.grids import enlarge, grid, stack
from diffengine.models.generation import GenerationOptions, ImageRequest
from diffengine.models.loading import quiet_libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet_libraries()
    options.out.mkdir(parents=True, exist_ok=True)

    data = config.resolve(config.read("amused_32_emoji"))["train_dataloader"]["dataset"]
    data = {key: value for key, value in data.items() if key not in ("type", "split")}
    dataset = EmojiDataset(**data, split="all")
    samples = [dataset[index] for index in range(len(dataset))]
    unseen = set(chain.from_iterable(EmojiDataset(**data, split="unseen").all_captions()))
    captions = [sample["text"] for sample in samples]
    originals = [sample["image"] for sample in samples]
    held_out = np.array([caption in unseen for caption in captions])

    pipeline = AmusedPipeline.from_pretrained(options.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    generated = generate_all(pipeline, captions, options.guidance, options.seed)
    reconstructed = reconstruct(pipeline, originals)
    save_images(pipeline, captions, originals, generated, held_out, options)

    print(f"chance {1 / len(captions):.4f}")
    ceiling = nearest_is_correct(reconstructed, originals)
    print(f"VQ ceiling {ceiling[~held_out].mean():.3f} trained, {ceiling[held_out].mean():.3f} unseen")
    hits = nearest_is_correct(generated, originals)
    print(f"unseen retrieval@1 {hits[held_out].mean():.3f} over {held_out.sum()} prompts")
    print(f"retrieval@1 {hits[~held_out].mean():.3f} over {(~held_out).sum()} prompts")


def generate_all(pipeline: AmusedPipeline, captions: list[str], guidance: float, seed: int) -> list[Image.Image]:
    """One image per caption, in batches of 64."""
    generator = torch.Generator().manual_seed(seed)
    generated: list[Image.Image] = []
    started = time.perf_counter()
    for start in range(0, len(captions), 64):
        generated += pipeline(captions[start : start + 64], guidance_scale=guidance, generator=generator).images
        if len(captions) > 64:
            print(f"generated {len(generated)}/{len(captions)} in {time.perf_counter() - started:.0f} s", flush=True)
    return generated


@torch.no_grad()
def reconstruct(pipeline: AmusedPipeline, images: list[Image.Image]) -> list[Image.Image]:
    """Encode images to VQ tokens and decode them: an upper bound for generated images."""
    pixels = pipeline.image_processor.preprocess(images)
    decoded = torch.cat(
        [pipeline.vqvae.decode(pipeline.vqvae.encode(chunk).latents).sample for chunk in pixels.split(64)]
    )
    return pipeline.image_processor.postprocess(decoded.clamp(0, 1), output_type="pil")


def nearest_is_correct(generated: list[Image.Image], originals: list[Image.Image]) -> np.ndarray:
    """(N,) bool: for each image, whether the nearest original is the one with the same caption."""
    return distances(generated, originals).argmin(axis=1) == np.arange(len(originals))


def distances(images: list[Image.Image], others: list[Image.Image]) -> np.ndarray:
    """(N, M): L2 distances over pixels."""
    a, b = (
        torch.tensor(np.stack([np.asarray(image) for image in group]), dtype=torch.float64).flatten(1)
        for group in (images, others)
    )
    return torch.cdist(a, b).numpy()


def save_images(
    pipeline: AmusedPipeline,
    captions: list[str],
    originals: list[Image.Image],
    generated: list[Image.Image],
    held_out: np.ndarray,
    options: argparse.Namespace,
) -> None:
    """Save `grid.png`, `strip.png` and `inpaint.png`.

    `grid.png` shows twelve emoji on four backgrounds: the original on the left, the generated image on the right,
    framed if the caption was not trained. `strip.png` shows one image after each of its 12 steps. `inpaint.png` shows
    an image with one half generated again.
    """
    chosen = [emoji * 4 + background for emoji in range(0, len(captions) // 4, 11) for background in range(4)]
    cells = [(("UNSEEN " if held_out[index] else "") + captions[index],
              pair(originals[index], generated[index], bool(held_out[index]))) for index in chosen]  # fmt: skip
    grid(cells, columns=8).save(options.out / "grid.png")
    index = int(np.flatnonzero(held_out)[0])
    request = ImageRequest(captions[index], options.seed)
    step_images = api.load_sampler(options.pipeline).generate_steps(request, GenerationOptions(options.guidance))
    steps = grid([(f"step {step + 1}", image) for step, image in enumerate(step_images)], columns=12, smallest=64)
    stack([(captions[index], steps)]).save(options.out / "strip.png")
    inpaint(pipeline, captions[index], originals[index], options).save(options.out / "inpaint.png")


def pair(original: Image.Image, generated: Image.Image, framed: bool) -> Image.Image:
    """Original and generated image side by side, enlarged; with a red frame if `framed`."""
    left, right = enlarge(original, 64), enlarge(generated, 64)
    both = Image.new("RGB", (left.width * 2 + 2, left.height), (255, 255, 255))
    both.paste(left, (0, 0))
    both.paste(right, (left.width + 2, 0))
    if framed:
        ImageDraw.Draw(both).rectangle((0, 0, both.width - 1, both.height - 1), outline=(220, 30, 30), width=2)
    return both


def inpaint(pipeline: AmusedPipeline, caption: str, original: Image.Image, options: argparse.Namespace) -> Image.Image:
    """Generate the right half of an image again: the original, the kept half and the result, side by side."""
    mask = Image.new("L", original.size, 0)
    mask.paste(255, (original.width // 2, 0, original.width, original.height))
    components = {**pipeline.components, "scheduler": AmusedScheduler.from_config(pipeline.scheduler.config)}
    inpainting = AmusedInpaintPipeline(**components)  # it modifies the config of its scheduler, hence the copy
    inpainting.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(options.seed)
    result = inpainting(
        caption, original, mask, strength=1.0, guidance_scale=options.guidance, generator=generator
    ).images[0]
    kept = Image.composite(Image.new("RGB", original.size, (128, 128, 128)), original, mask)
    return grid([("original", original), ("kept", kept), (caption, result)], columns=3)


if __name__ == "__main__":
    main()
