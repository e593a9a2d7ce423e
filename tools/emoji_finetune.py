"""Score the fine-tunes of the emoji base, or write the image of a DreamBooth subject.

    python tools/emoji_finetune.py score CONFIG [--base PIPELINE] [--tuned PIPELINE]
    python tools/emoji_finetune.py subject FOLDER

Both pipelines generate from three groups of prompts: "new seen" are trained captions, "new unseen" combine the words of
trained captions in new ways, "old" are 64 of the base's captions. Their table is that of `diffengine eval`, over all
originals, new and old.

If a config learns the style of a second artist, the style score is printed too: the share of generated images that are
nearer to this artist's original than to the first artist's, for the same concept on the same background.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from diffengine import api, config
from diffengine.datasets import EmojiDataset
from diffengine.evaluation import EvalData, Gallery, Source, evaluate
from diffengine.models.generation import GenerationOptions
from diffengine.models.loading import quiet_libraries

Originals = dict[str, Any]  # images by caption
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
    options = parser.parse_args()
    if options.command == "score":
        score(options.config, {"before": options.base, "after": options.tuned or f"work_dirs/{options.config}"})
    else:
        options.folder.mkdir(parents=True, exist_ok=True)
        subject_image("white").save(options.folder / "dog.png")


def score(name: str, pipelines: dict[str, str]) -> None:
    quiet_libraries()
    base = originals()
    seen, unseen, style = read_prompts(name, base)
    old = {caption: base[caption] for index, caption in enumerate(base) if index % 8 == index // 8 % 4}
    captions: list[str] = []
    groups: dict[str, list[int]] = {}
    for group, members in {"new seen": seen, "new unseen": unseen, "old": old}.items():
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


def subject_image(color: str) -> Any:
    """OpenMoji's dog, which the base was not trained on."""
    return originals(artists={"openmoji": ""}, count=126)[f"dog on a {color} background"]


if __name__ == "__main__":
    main()
