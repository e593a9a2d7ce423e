"""Train emoji on a background that masks keep from being learnt, and show which tokens are learnt.

    python tools/emoji_regions.py [--work-dir work_dirs/emoji_regions]

Each of 16 new emoji stands on four colours and is named alone; 24 old ones on plain backgrounds are mixed in, whole.
The base learns them without masks (unmasked_weight=1), with 0.1 and with 0. In the white of the masks and in the black,
the table has the loss of the new images' tokens, and how many images generated from the names are nearest, over these
pixels only, to the right one of the 16. Needs `make demo` for the base.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffengine import api, cli, config
from diffengine.datasets import EmojiDataset, ImageTextDataset, ToTensor, as_list, collate
from diffengine.evaluation.heldout import fixed_images, losses
from diffengine.grids import Captioned, grid, save_image, stack
from diffengine.models.generation import GenerationOptions, ImageRequest, ImageSampler

OLD, NEW = {"start": 104, "count": 24}, {"start": 128, "count": 16}
COPIES = 4  # of each new image, since there are 72 old ones; and images generated from each name
SHOWN = 8
WEIGHTS = (1.0, 0.1, 0.0)

Samples = list[dict[str, Any]]


def write(folder: Path) -> None:
    """The trained images with their captions and masks."""
    folder.mkdir(parents=True, exist_ok=True)
    base = config.resolve(config.read("amused_32_emoji"))["train_dataloader"]["dataset"]
    options = {key: value for key, value in base.items() if key != "type"}
    for number, (caption, image) in enumerate(_by_caption(EmojiDataset(**{**options, **OLD})).items()):
        image.save(folder / f"old_{number:03}.png")
        (folder / f"old_{number:03}.txt").write_text(caption)
    plain = {"white": [255, 255, 255], "black": [0, 0, 0]}
    both = _by_caption(EmojiDataset(**{**options, **NEW, "backgrounds": plain, "split": "all"}))
    colors, rng = np.array([*base["backgrounds"].values()]), np.random.default_rng(0)
    for number, name in enumerate(dict.fromkeys(caption.split(" on a ")[0] for caption in both)):
        white, black = (np.asarray(both[f"{name} on a {color} background"], float) for color in plain)
        alpha = 1 - (white - black).mean(axis=2, keepdims=True) / 255
        background = colors[rng.permutation(4).reshape(2, 2)].repeat(16, axis=0).repeat(16, axis=1)
        for copy in range(COPIES):
            stem = folder / f"new_{number:02}_{copy}"
            for ending, pixels in ((".png", black + (1 - alpha) * background), (".mask.png", 255 * alpha[..., 0])):
                Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(f"{stem}{ending}")
            Path(f"{stem}.txt").write_text(name)


def _by_caption(dataset: EmojiDataset) -> dict[str, Image.Image]:
    samples = [dataset[index] for index in range(len(dataset))]
    return {as_list(sample["text"])[0]: sample["image"] for sample in samples}


def masked_samples(folder: Path) -> Samples:
    """One sample of each name with a mask."""
    dataset = ImageTextDataset(str(folder))
    samples = [sample for sample in map(dataset.__getitem__, range(len(dataset))) if "mask" in sample]
    return list({sample["text"]: sample for sample in samples}.values())


def region_loss(sampler: ImageSampler, samples: Samples, table: list[int]) -> float:
    """The mean loss of tokens, at the shares of validation, by masks whose values are looked up in a table."""
    changed = [{**sample, "mask": sample["mask"].point(table)} for sample in samples]
    tensors = [(ToTensor()(sample, np.random.default_rng(0)), index) for index, sample in enumerate(changed)]
    return losses(sampler, fixed_images(sampler, tensors, seed=0), captions=True, batch_size=32).mean


def recognized(generated: list[Image.Image], samples: Samples, value: int) -> float:
    """The share of images, `COPIES` of each sample, nearest to their own over pixels whose mask has a value."""
    images = np.stack([np.asarray(sample["image"], float) for sample in samples])
    right = np.repeat(np.arange(len(samples)), COPIES)
    chosen = [np.asarray(samples[index]["mask"]) == value for index in right]
    pairs = zip(generated, chosen)
    errors = [((images - np.asarray(image, float)) ** 2)[:, pixels].mean(axis=(1, 2)) for image, pixels in pairs]
    return float((np.argmin(errors, axis=1) == right).mean())


def token_losses(sampler: ImageSampler, sample: dict[str, Any]) -> Image.Image:
    """The loss of each token while half of all are masked: black for 0, white for that of a guess, or more."""
    whole = {key: value for key, value in sample.items() if key != "mask"}
    (fixed,) = fixed_images(sampler, [(ToTensor()(whole, np.random.default_rng(0)), 0)], seed=0)
    tokens = {key: value for key, value in fixed.sample.items() if key in ("token_ids", "micro_conds", "text")}
    found = np.zeros(len(fixed.order_L))
    for half in np.split(fixed.order_L, 2):
        for number, token in enumerate(half):
            one = np.zeros(len(half), np.float32)
            one[number] = 1
            loss, _ = sampler.masked_loss(collate([{**tokens, "masked": half, "target_weights": one}]))
            found[token] = float(loss) / np.log(sampler.num_codes)
    grey = (255 * found.clip(0, 1)).astype(np.uint8).reshape(tokens["token_ids"].shape)
    return Image.fromarray(grey).resize(sample["image"].size, Image.Resampling.NEAREST).convert("RGB")


def evaluate(weight: float, work_dir: Path, samples: Samples) -> list[tuple[str, list[Captioned]]]:
    """Print a row of the table, and return rows of images."""
    sampler = api.load_sampler(work_dir)
    names = [sample["text"] for sample in samples for _ in range(COPIES)]
    requests = [ImageRequest(name, seed) for seed, name in enumerate(names)]
    generated = list(sampler.generate(requests, GenerationOptions(1.0)))
    white, black = ([0] * 255 + [255], [255] + [0] * 255)
    cells = [region_loss(sampler, samples, white), recognized(generated, samples, 255)]
    cells += [region_loss(sampler, samples, black), recognized(generated, samples, 0)]
    print(f"| {weight:g} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    what = f"unmasked_weight={weight:g}{' (without masks)' if weight == 1 else ''}"
    maps = [(sample["text"], token_losses(sampler, sample)) for sample in samples[:SHOWN]]
    first = list(zip(names[::COPIES], generated[::COPIES]))[:SHOWN]
    return [(f"{what}: the loss of each token, black is learnt", maps), (f"{what}: generated from the name", first)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/emoji_regions"))
    root = parser.parse_args().work_dir
    write(root / "data")
    samples = masked_samples(root / "data")
    rows = [("trained images", [(one["text"], one["image"]) for one in samples[:SHOWN]])]
    rows += [("their masks", [(one["text"], one["mask"].convert("RGB")) for one in samples[:SHOWN]])]
    print(
        "| unmasked_weight | loss in the white | recognized | loss in the black | recognized |\n|---|---|---|---|---|"
    )
    for weight in WEIGHTS:
        work_dir = root / f"{weight:g}"
        options = ["--cfg-options", f"data={root / 'data'}", f"unmasked_weight={weight}"]
        if not list(work_dir.glob("*.pth")):
            code = cli.main(["train", "amused_32_emoji_regions", "--work-dir", str(work_dir), "--overwrite", *options])
            if code:
                raise SystemExit(code)
        rows += evaluate(weight, work_dir, samples)
    save_image(stack([(title, grid(images, SHOWN, smallest=64)) for title, images in rows]), root / "regions.png")
    print(f"wrote {root / 'regions.png'}")


if __name__ == "__main__":
    main()
