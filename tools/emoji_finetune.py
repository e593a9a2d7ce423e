"""Score the fine-tunes of the emoji base, or write the image of a DreamBooth subject.

    python tools/emoji_finetune.py score CONFIG [--base PIPELINE] [--tuned PIPELINE] [--image FILE.png]
    python tools/emoji_finetune.py subject FOLDER

retrieval@1: the share of generated images whose nearest original, in L2 distance over pixels, is the one with the same
caption, among all originals, new and old. Seen prompts are trained captions. Unseen prompts combine the words of
trained captions in new ways. Old prompts are 64 of the base's captions.

If a config learns the style of a second artist, the style score is printed too: the share of generated images that are
nearer to this artist's original than to the first artist's, for the same concept on the same background.

The scores depend only on the images that the two pipelines generate.
"""

import argparse
from pathlib import Path
from typing import Any

from diffengine import config  # before diffusers: it silences the libraries that diffusers imports

# isort: split
import numpy as np
from diffusers import AmusedPipeline
from emoji_demo import distances, generate_all, pair
from PIL import Image

from diffengine.datasets import EmojiDataset
from diffengine.grids import enlarge, grid
from diffengine.models.loading import quiet_libraries

Originals = dict[str, Image.Image]  # by caption
REPEAT_UP_TO = 16  # images per group: a smaller group repeats its prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    scoring = commands.add_parser("score", help="score a fine-tune on new and old prompts")
    scoring.add_argument("config")
    scoring.add_argument("--base", type=Path, default=Path("work_dirs/emoji_demo/pipeline"))
    scoring.add_argument("--tuned", type=Path, help="default: work_dirs/CONFIG")
    scoring.add_argument("--image", type=Path, help="save some images: original, before, after")
    scoring.add_argument("--guidance", type=float, default=1.0)
    scoring.add_argument("--seed", type=int, default=0)
    writing = commands.add_parser("subject", help="write the image for amused_32_emoji_dreambooth")
    writing.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command == "score":
        score(options)
    else:
        options.folder.mkdir(parents=True, exist_ok=True)
        subject_image("white").save(options.folder / "dog.png")


def score(options: argparse.Namespace) -> None:
    quiet_libraries()
    base = originals()
    seen, unseen, style = read_prompts(options.config, base)
    old = {caption: base[caption] for index, caption in enumerate(base) if index % 8 == index // 8 % 4}
    gallery = {**base, **seen, **unseen}
    pipelines = [load_pipeline(options.base), load_pipeline(options.tuned or Path("work_dirs") / options.config)]
    cells: list[tuple[str, Image.Image]] = []
    for name, group in {"new seen": seen, "new unseen": unseen, "old": old}.items():
        captions = [caption for caption in group for _ in range(max(1, REPEAT_UP_TO // len(group)))]
        generated = [generate_all(pipeline, captions, options.guidance, options.seed) for pipeline in pipelines]
        before, after = (retrieval(images, captions, gallery) for images in generated)
        print(f"{name} retrieval@1 {before:.3f} before, {after:.3f} after, over {len(captions)} images")
        if style and group is not old:
            before, after = (style_score(images, captions, group, base, style) for images in generated)
            print(f"{name} style {before:.3f} before, {after:.3f} after")
        for index in np.linspace(0, len(captions) - 1, min(8, len(captions))).astype(int):
            both = pair(generated[0][index], generated[1][index], group is unseen)
            cells.append((f"{name}: {captions[index]}", join(group[captions[index]], both)))
    if options.image:
        options.image.parent.mkdir(parents=True, exist_ok=True)
        grid(cells, columns=4).save(options.image)


def read_prompts(name: str, base: Originals) -> tuple[Originals, Originals, str]:
    """Seen and unseen prompts of a config, and the words for the second artist's style, if it has one."""
    data = config.resolve(config.read(name))["train_dataloader"]["dataset"]
    if "instance_prompt" in data:
        prompt = data["instance_prompt"]
        colors = {color: prompt.replace("white", color) for color in ("white", "pink", "green", "blue")}
        images = {caption: subject_image(color) for color, caption in colors.items()}
        return {prompt: images.pop(prompt)}, images, ""
    data = {key: value for key, value in data.items() if key != "type"}
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


def subject_image(color: str) -> Image.Image:
    """OpenMoji's dog, which the base was not trained on."""
    return originals(artists={"openmoji": ""}, count=126)[f"dog on a {color} background"]


def load_pipeline(folder: Path) -> AmusedPipeline:
    pipeline = AmusedPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def retrieval(generated: list[Image.Image], captions: list[str], gallery: Originals) -> float:
    """The share of images whose nearest original has the same caption."""
    indices = {caption: index for index, caption in enumerate(gallery)}
    nearest = distances(generated, list(gallery.values())).argmin(axis=1)
    return float(np.mean(nearest == [indices[caption] for caption in captions]))


def style_score(
    generated: list[Image.Image], captions: list[str], group: Originals, base: Originals, style: str
) -> float:
    """The share of images that are nearer to the second artist's original than to the first artist's."""
    second, first = (
        np.diagonal(distances(generated, [originals[caption] for caption in prompts]))
        for originals, prompts in (
            (group, captions), (base, [caption.removesuffix(f" {style}") for caption in captions])
        )
    )  # fmt: skip
    return float(np.mean(second < first))


def join(original: Image.Image, both: Image.Image) -> Image.Image:
    """The original to the left of the images before and after fine-tuning."""
    left = enlarge(original, both.height)
    sheet = Image.new("RGB", (left.width + 2 + both.width, both.height), (255, 255, 255))
    sheet.paste(left, (0, 0))
    sheet.paste(both, (left.width + 2, 0))
    return sheet


if __name__ == "__main__":
    main()
