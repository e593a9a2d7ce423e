"""Real colour photos with captions, without downloads.

scikit-image ships them as plain files. They are opened directly from its folder, because `skimage.data.NAME()`
downloads what its registry does not find.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from diffengine.datasets import ImageDataset

CaptionFormat = Literal["csv", "jsonl", "txt"]

# name -> (file, caption). The commas, the quotes and the accent are deliberate: real captions have them.
_PHOTOS: dict[str, tuple[str, str]] = {
    "astronaut": ("astronaut.png", "a portrait of an astronaut, smiling in an orange suit"),
    "cat": ("chelsea.png", "a close photo of a cat"),
    "coffee": ("coffee.png", "a cup of coffee on a wooden table, with a spoon"),
    "galaxies": ("hubble_deep_field.jpg", 'galaxies in the "Hubble deep field"'),
    "tissue": ("ihc.png", "stained tissue under a microscope"),
    "motorcycle": ("motorcycle_left.png", "a motorcycle in a garage"),
    "motorcycle_right": ("motorcycle_right.png", "a motorcycle in a garage, from further right"),
    "retina": ("retina.jpg", "the retina of an eye, photographed à la carte"),
    "rocket": ("rocket.jpg", "a rocket on its launch pad at night"),
}


@lru_cache
def _photo(name: str) -> Image.Image:
    """The RGB image, decoded once. Do not modify it."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise RuntimeError("the photos need: pip install 'scikit-image>=0.26'")
    with Image.open(Path(spec.origin).parent / "data" / _PHOTOS[name][0]) as image:
        return image.convert("RGB")


def photos() -> dict[str, Image.Image]:
    """Nine RGB images by name, from 451x300 (cat) to 1411x1411 (retina). Each call returns new copies."""
    return {name: _photo(name).copy() for name in _PHOTOS}


def captions() -> dict[str, str]:
    """The captions of photos() by name. All differ."""
    return {name: caption for name, (_, caption) in _PHOTOS.items()}


def captioned_photos(n: int | None = None, size: int | None = None) -> list[tuple[str, Image.Image, str]]:
    """n tuples (name, RGB image, caption). All names, images and captions differ; every call returns the same.

    The first nine are the whole photos, the others random crops of them ("..., detail 1"). n: nine if None. size: side
    in pixels of a square from the centre of each; None keeps the sizes, which all differ.
    """
    names, texts = list(_PHOTOS), captions()
    rng = random.Random(0)
    rows = []
    for k in range(len(names) if n is None else n):
        detail, index = divmod(k, len(names))
        name = names[index]
        image, caption = _photo(name).copy(), texts[name]
        if detail:
            width, height = image.size
            side = int(min(width, height) * rng.uniform(0.4, 0.8))
            left, top = rng.randint(0, width - side), rng.randint(0, height - side)
            image = image.crop((left, top, left + side, top + side))
            name, caption = f"{name}_{detail}", f"{caption}, detail {detail}"
        if size is not None:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BICUBIC, box)
        rows.append((name, image, caption))
    return rows


def write_photo_folder(
    path: str | Path, n: int | None = None, size: int | None = None, captions: CaptionFormat = "csv"
) -> dict[str, str]:
    """Writes captioned_photos(n, size), alternately as JPG and PNG; returns file name -> caption, in order.

    captions: "csv" or "jsonl" for metadata.csv or metadata.jsonl with columns file_name and text, as in the image
    folders of `datasets`; "txt" for NAME.txt next to NAME.jpg.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    texts = {}
    for k, (name, image, caption) in enumerate(captioned_photos(n, size)):
        file = f"{name}.png" if k % 2 else f"{name}.jpg"
        image.save(path / file, quality=95)  # ignored for PNG
        texts[file] = caption
    if captions == "csv":
        with open(path / "metadata.csv", "w", newline="", encoding="utf-8") as table:
            csv.writer(table).writerows([("file_name", "text"), *texts.items()])
    elif captions == "jsonl":
        rows = [{"file_name": file, "text": text} for file, text in texts.items()]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (path / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    elif captions == "txt":
        for file, text in texts.items():
            (path / file).with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    else:
        raise ValueError(f'captions got {captions!r}; expected "csv", "jsonl" or "txt"')
    return texts


def all_captions(dataset: ImageDataset) -> list[str]:
    """Every caption of a data set, in order."""
    return [text for texts in dataset.all_captions() for text in texts]


SCRIPTS = (
    "a portrait of an astronaut, smiling", "портрет астронавта, улыбка", "宇航员的肖像，微笑", "صورة لرائد فضاء يبتسم",
    "एक अंतरिक्ष यात्री का चित्र", "πορτρέτο ενός αστροναύτη",
)  # fmt: skip


def write_newcomer_folder(path: Path) -> list[str]:
    """About 40 images as they come: portraits, landscapes, alpha, EXIF, grey, 16 bits, several formats, two damaged.

    Captions are in NAME.txt: in six scripts, one of 400 words, one empty. Returns the names of what cannot be read.
    """
    path.mkdir(parents=True)
    rows, rng = captioned_photos(26), random.Random(1)
    for number, (name, image, caption) in enumerate(rows):
        width, height = image.size
        if number % 3 == 0:
            image = image.crop((0, 0, min(width, height * 2 // 3), height))
        elif number % 3 == 1:
            image = image.crop((0, 0, width, min(height, width * 9 // 16)))
        image.thumbnail((900, 900) if number % 4 else (300, 300))
        file = path / f"{name}.{('jpg', 'png', 'webp')[number % 3]}"
        image.save(file, quality=88)
        text = SCRIPTS[number % 6] + f", {caption}" if number % 2 else caption
        file.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    cat, coffee, rocket = (_photo(name) for name in ("cat", "coffee", "rocket"))
    others = {
        "alpha.png": Image.merge(
            "RGBA", (*coffee.split(), coffee.convert("L").point(lambda level: 255 * (level > 60)))
        ),
        "grey.jpg": rocket.convert("L"),
        "deep.png": Image.fromarray(np.asarray(cat.convert("L")).astype(np.uint16) * 257),
        "frames.gif": cat.resize((225, 150)),
        "tiny.png": cat.resize((90, 60)),
        "wide.jpg": coffee.resize((1200, 300)),
    }
    for name, image in others.items():
        image.save(path / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    rocket.save(path / "turned.jpg", exif=exif)
    cat.resize((1000, 666)).save(path / "again.jpg", quality=60)  # the cat, compressed again
    shutil.copy(path / "grey.jpg", path / "grey copy.jpg")
    cut = path / "cut.jpg"
    coffee.save(cut)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
    (path / "page.png").write_text("<html>not found</html>")
    for file in sorted(path.iterdir()):
        if file.suffix != ".txt" and not (text := file.with_suffix(".txt")).exists():
            text.write_text(rng.choice(SCRIPTS) + "\n", encoding="utf-8")
    (path / "alpha.txt").write_text("")
    words = " ".join(f"{word} {number}" for number, word in enumerate(["a cup", "of coffee"] * 100))
    (path / "wide.txt").write_text(f"a wide cup of coffee {words}\n")
    (path / "tiny.txt").write_text("<script>alert(1)</script> \x1b[31mred\u202e\n", encoding="utf-8")
    return ["cut.jpg", "page.png"]
