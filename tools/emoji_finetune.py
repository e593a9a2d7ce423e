"""Score the fine-tunes of the emoji base, or write the images of a DreamBooth subject or of masked emoji.

    python tools/emoji_finetune.py score CONFIG [--base PIPELINE] [--tuned PIPELINE]
    python tools/emoji_finetune.py subject FOLDER
    python tools/emoji_finetune.py regions FOLDER

Both pipelines generate from three groups of prompts: "new seen" are trained captions, "new unseen" combine the words of
trained captions in new ways, "old" are 64 of the base's captions. Their table is that of `diffengine eval`, over all
originals, new and old.

If a config learns the style of a second artist, the style score is printed too: the share of generated images that are
nearer to this artist's original than to the first artist's, for the same concept on the same background.

If a config's data has masks, so is, in the white and in the black, the loss of its images' tokens, and the share of
images generated from their captions that are nearest to the right one of them, over these pixels only.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffengine import api, config
from diffengine.datasets import EmojiDataset, ImageTextDataset, ToTensor
from diffengine.evaluation import EvalData, Gallery, Source, evaluate
from diffengine.evaluation.heldout import fixed_images, losses
from diffengine.models.generation import GenerationOptions, ImageRequest, ImageSampler
from diffengine.models.loading import quiet_libraries

Originals = dict[str, Any]  # images by caption
OLD, MASKED = {"start": 104, "count": 24}, {"start": 128, "count": 16}  # emoji of amused_32_emoji_regions
COPIES = 4  # of each new one, since there are 72 old ones
REPEAT_UP_TO = 16  # images per group: a smaller group repeats its prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    scoring = commands.add_parser("score", help="score a fine-tune on new and old prompts")
    scoring.add_argument("config")
    scoring.add_argument("--base", default="work_dirs/emoji_demo/pipeline")
    scoring.add_argument("--tuned", help="default: work_dirs/CONFIG")
    writing = commands.add_parser("subject", help="write the image for amused_32_emoji_dreambooth")
    writing.add_argument("folder", type=Path)
    masked = commands.add_parser("regions", help="write the images and masks for amused_32_emoji_regions")
    masked.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command == "score":
        score(options.config, {"before": options.base, "after": options.tuned or f"work_dirs/{options.config}"})
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.command == "subject":
        subject_image("white").save(options.folder / "dog.png")
    else:
        write_regions(options.folder)


def score(name: str, pipelines: dict[str, str]) -> None:
    quiet_libraries()
    base = originals()
    seen, unseen, style = read_prompts(name, base)
    old = {caption: base[caption] for index, caption in enumerate(base) if index % 8 == index // 8 % 4}
    captions: list[str] = []
    groups: dict[str, list[int]] = {}
    for group, members in {"new seen": seen, "new unseen": unseen, "old": old}.items():
        if not members:
            continue
        repeated = [caption for caption in members for _ in range(max(1, REPEAT_UP_TO // len(members)))]
        groups[group] = list(range(len(captions), len(captions) + len(repeated)))
        captions += repeated
    known = {**base, **seen, **unseen}
    others = {caption: image for caption, image in known.items() if caption not in captions}
    data = EvalData(captions, [known[caption] for caption in captions], groups, others)
    sources = [
        Source(label, partial(api.load_sampler, folder), f"{folder} {Path(folder).stat().st_mtime_ns}")
        for label, folder in pipelines.items()
    ]
    found = evaluate(sources, data, [GenerationOptions(1.0)], Path("work_dirs") / name / "eval")
    print(found.markdown())
    for label, images in found.images.items() if style else ():
        for group in ("new seen", "new unseen") if "guidance" in label else ():
            pairs = [(captions[index], images[index]) for index in groups[group]]
            share = sum(nearer(image, known[text], base[text.removesuffix(f" {style}")]) for text, image in pairs)
            print(f"{label}: {group} style {share / len(pairs):.3f}")
    data_folder = config.resolve(config.read(name)).get("data", "")
    for source in sources if any(Path(data_folder).glob("*.mask.png")) else ():
        sampler = source.open()
        losses_and_shares = zip(region_losses(sampler, data_folder), recognized(sampler, data_folder))
        for where, (loss, rate) in zip(("white", "black"), losses_and_shares):
            print(f"{source.name}: in the {where} loss {loss:.3f}, recognized {rate:.3f}")
    print(f"the images are in {found.folder}")


def nearer(image: Any, one: Any, other: Any) -> bool:
    """Whether an image is nearer to one than to another, over pixels."""
    return Gallery(["one", "other"], [one, other]).ranks([image], ["one"])[0] == 0


def read_prompts(name: str, base: Originals) -> tuple[Originals, Originals, str]:
    """Seen and unseen prompts of a config, and the words for the second artist's style, if it has one."""
    data = config.resolve(config.read(name))["train_dataloader"]["dataset"]
    if "instance_prompt" in data:
        prompt = data["instance_prompt"]
        colors = {color: prompt.replace("white", color) for color in ("white", "pink", "green", "blue")}
        images = {caption: subject_image(color) for color, caption in colors.items()}
        return {prompt: images.pop(prompt)}, images, ""
    data = {key: value for key, value in data.items() if key != "type"}
    if data.get("path") and any(Path(data["path"]).glob("*.mask.png")):
        return {}, originals(**MASKED), ""
    style = data.get("artists", {}).get("openmoji", "")
    seen, unseen = (
        {caption: image for caption, image in read_images(EmojiDataset(**options)).items() if caption not in base}
        for options in (data, {**data, "split": "unseen"})
    )
    if not style:
        return seen, unseen, ""
    trained = {concept(caption) for caption in seen}
    all_concepts = originals(artists={"openmoji": style}, count=126)
    unseen = {caption: image for caption, image in all_concepts.items() if concept(caption) not in trained}
    return seen, unseen, style


def originals(**options: Any) -> Originals:
    """The emoji of the base on all its backgrounds; `options` override those of the data set."""
    data = config.resolve(config.read("amused_32_emoji"))["train_dataloader"]["dataset"]
    data = {key: value for key, value in data.items() if key != "type"}
    return read_images(EmojiDataset(**{**data, "split": "all", **options}))


def read_images(dataset: EmojiDataset) -> Originals:
    samples = (dataset[index] for index in range(len(dataset)))
    return {sample["text"]: sample["image"] for sample in samples}


def concept(caption: str) -> str:
    return caption.split(" on a ")[0]


def write_regions(folder: Path) -> None:
    """Old emoji on plain backgrounds; new ones on a patchwork each, named alone, and their masks, in four copies."""
    colors = config.resolve(config.read("amused_32_emoji"))["backgrounds"]
    texts = originals(split="train", **OLD)
    for number, (caption, image) in enumerate(texts.items()):
        image.save(folder / f"old_{number:03}.png")
        (folder / f"old_{number:03}.txt").write_text(caption)
    both = originals(**MASKED, backgrounds=["white", "black"])
    rng = np.random.default_rng(0)
    for number, name in enumerate(dict.fromkeys(map(concept, both))):
        white, black = (np.asarray(both[f"{name} on a {color} background"], float) for color in ("white", "black"))
        alpha = 1 - (white - black).mean(axis=2, keepdims=True) / 255
        patches = np.array([*colors.values()])[rng.permutation(len(colors)).reshape(2, 2)].repeat(16, 0).repeat(16, 1)
        for copy in range(COPIES):
            stem = folder / f"new_{number:02}_{copy}"
            for ending, pixels in ((".png", black + (1 - alpha) * patches), (".mask.png", 255 * alpha[..., 0])):
                Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(f"{stem}{ending}")
            Path(f"{stem}.txt").write_text(name)


def masked_samples(folder: str) -> list[dict[str, Any]]:
    """One sample of each caption, of those with a mask."""
    dataset = ImageTextDataset(folder)
    samples = [sample for sample in map(dataset.__getitem__, range(len(dataset))) if "mask" in sample]
    return list({sample["text"]: sample for sample in samples}.values())


def recognized(sampler: ImageSampler, folder: str) -> list[float]:
    """Share of generated images nearest to their caption's image, in the white of its mask and in the black."""
    samples = masked_samples(folder)
    right = [index for index in range(len(samples)) for _ in range(COPIES)]
    requests = [ImageRequest(samples[index]["text"], seed) for seed, index in enumerate(right)]
    generated = list(sampler.generate(requests, GenerationOptions(1.0)))
    images = np.stack([np.asarray(sample["image"], float) for sample in samples])
    found = []
    for value in (255, 0):
        chosen = [np.asarray(samples[index]["mask"]) == value for index in right]
        pairs = zip(generated, chosen)
        errors = [((images - np.asarray(image, float)) ** 2)[:, pixels].mean(axis=(1, 2)) for image, pixels in pairs]
        found.append(float(np.mean(np.argmin(errors, axis=1) == right)))
    return found


def region_losses(sampler: ImageSampler, folder: str) -> list[float]:
    """The mean loss of the tokens in the white of masks, and in the black, at the shares of validation."""
    found = []
    for table in ([0] * 255 + [255], [255] + [0] * 255):
        rng = np.random.default_rng(0)
        samples = [ToTensor()({**one, "mask": one["mask"].point(table)}, rng) for one in masked_samples(folder)]
        images = fixed_images(sampler, [(sample, index) for index, sample in enumerate(samples)], seed=0)
        found.append(losses(sampler, images, captions=True, batch_size=32).mean)
    return found


def subject_image(color: str) -> Any:
    """OpenMoji's dog, which the base was not trained on."""
    return originals(artists={"openmoji": ""}, count=126)[f"dog on a {color} background"]


if __name__ == "__main__":
    main()
