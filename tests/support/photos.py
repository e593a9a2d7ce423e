"""Real colour photos with captions, without downloads.

scikit-image ships them as plain files. They are opened directly from its folder, because `skimage.data.NAME()`
downloads what its registry does not find.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Literal

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
