"""The fine-tunes of the emoji base: what one learnt and what it forgot; and the images of a subject.

    python tools/emoji_finetune.py score CONFIG [--base PIPELINE] [--tuned PIPELINE] [--image FILE.png]
    python tools/emoji_finetune.py subject FOLDER

retrieval@1: a drawn image counts when, of all originals, new and old, its own caption's is nearest in L2
over pixels. Seen prompts are the captions that were trained; unseen ones put their words together as no
trained one did; old ones are 64 of the base's. Where a second artist is learnt, the right hand: of the two
artists' originals of the same concept on the same background, the one that was asked for is nearer.
The numbers come from the images that the two pipelines drew, nothing else.
"""

import argparse
from pathlib import Path
from typing import Any

from diffengine import config  # before diffusers: it quiets what that imports

# isort: split
import numpy as np
from diffusers import AmusedPipeline
from emoji_demo import distances, draw_all, pair
from PIL import Image

from diffengine.datasets import EmojiDataset
from diffengine.grids import enlarge, grid
from diffengine.models.loading import quiet_libraries

Originals = dict[str, Image.Image]  # by caption
FEWEST = 16  # images to draw of a group with fewer prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    scoring = commands.add_parser("score", help="what a fine-tune learnt and forgot")
    scoring.add_argument("config")
    scoring.add_argument("--base", type=Path, default=Path("work_dirs/emoji_demo/pipeline"))
    scoring.add_argument("--tuned", type=Path, help="default work_dirs/CONFIG")
    scoring.add_argument("--image", type=Path, help="draw some prompts: original, before, after")
    scoring.add_argument("--guidance", type=float, default=1.0)
    scoring.add_argument("--seed", type=int, default=0)
    writing = commands.add_parser("subject", help="write the images of amused_32_emoji_dreambooth")
    writing.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command == "score":
        score(options)
    else:
        options.folder.mkdir(parents=True, exist_ok=True)
        subject("white").save(options.folder / "dog.png")


def score(options: argparse.Namespace) -> None:
    quiet_libraries()
    base = originals()
    seen, unseen, words = asked(options.config, base)
    old = {caption: base[caption] for index, caption in enumerate(base) if index % 8 == index // 8 % 4}
    gallery = {**base, **seen, **unseen}
    pipelines = [load(options.base), load(options.tuned or Path("work_dirs") / options.config)]
    cells: list[tuple[str, Image.Image]] = []
    for name, group in {"new seen": seen, "new unseen": unseen, "old": old}.items():
        captions = [caption for caption in group for _ in range(max(1, FEWEST // len(group)))]
        drawn = [draw_all(pipeline, captions, options.guidance, options.seed) for pipeline in pipelines]
        before, after = (retrieval(images, captions, gallery) for images in drawn)
        print(f"{name} retrieval@1 {before:.3f} before, {after:.3f} after, over {len(captions)} drawings")
        if words and group is not old:
            before, after = (in_hand(images, captions, group, base, words) for images in drawn)
            print(f"{name} in the right hand {before:.3f} before, {after:.3f} after")
        for index in np.linspace(0, len(captions) - 1, min(8, len(captions))).astype(int):
            both = pair(drawn[0][index], drawn[1][index], group is unseen)
            cells.append((f"{name}: {captions[index]}", beside(group[captions[index]], both)))
    if options.image:
        options.image.parent.mkdir(parents=True, exist_ok=True)
        grid(cells, columns=4).save(options.image)


def asked(name: str, base: Originals) -> tuple[Originals, Originals, str]:
    """Seen and unseen prompts of a config, and the words that ask for the second artist, if it has one."""
    data = config.resolve(config.read(name))["train_dataloader"]["dataset"]
    if "instance_prompt" in data:
        prompt = data["instance_prompt"]
        colors = {color: prompt.replace("white", color) for color in ("white", "pink", "green", "blue")}
        drawn = {caption: subject(color) for color, caption in colors.items()}
        return {prompt: drawn.pop(prompt)}, drawn, ""
    data = {key: value for key, value in data.items() if key != "type"}
    words = data.get("artists", {}).get("openmoji", "")
    seen, unseen = (
        {caption: image for caption, image in images(EmojiDataset(**some)).items() if caption not in base}
        for some in (data, {**data, "split": "unseen"})
    )
    if not words:
        return seen, unseen, ""
    taught = {concept(caption) for caption in seen}
    every = originals(artists={"openmoji": words}, count=126)
    unseen = {caption: image for caption, image in every.items() if concept(caption) not in taught}
    return seen, unseen, words


def originals(**options: Any) -> Originals:
    """The base's emoji on all its backgrounds."""
    data = config.resolve(config.read("amused_32_emoji"))["train_dataloader"]["dataset"]
    data = {key: value for key, value in data.items() if key != "type"}
    return images(EmojiDataset(**{**data, "split": "all", **options}))


def images(dataset: EmojiDataset) -> Originals:
    samples = (dataset[index] for index in range(len(dataset)))
    return {sample["text"]: sample["image"] for sample in samples}


def concept(caption: str) -> str:
    return caption.split(" on a ")[0]


def subject(color: str) -> Image.Image:
    """A dog that the base does not know: OpenMoji's."""
    return originals(artists={"openmoji": ""}, count=126)[f"dog on a {color} background"]


def load(folder: Path) -> AmusedPipeline:
    pipeline = AmusedPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def retrieval(drawn: list[Image.Image], captions: list[str], gallery: Originals) -> float:
    """The share of images whose nearest original is their own."""
    indices = {caption: index for index, caption in enumerate(gallery)}
    nearest = distances(drawn, list(gallery.values())).argmin(axis=1)
    return float(np.mean(nearest == [indices[caption] for caption in captions]))


def in_hand(drawn: list[Image.Image], captions: list[str], group: Originals, base: Originals, words: str) -> float:
    """The share of images that are nearer to the second artist's original than to the first's."""
    second, first = (
        np.diagonal(distances(drawn, [artist[caption] for caption in named]))
        for artist, named in (
            (group, captions), (base, [caption.removesuffix(f" {words}") for caption in captions])
        )
    )  # fmt: skip
    return float(np.mean(second < first))


def beside(original: Image.Image, both: Image.Image) -> Image.Image:
    """The original, left of before and after."""
    left = enlarge(original, both.height)
    sheet = Image.new("RGB", (left.width + 2 + both.width, both.height), (255, 255, 255))
    sheet.paste(left, (0, 0))
    sheet.paste(both, (left.width + 2, 0))
    return sheet


if __name__ == "__main__":
    main()
