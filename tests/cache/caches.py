"""Helpers for runs that train from a token cache."""

import shutil

import numpy as np

from diffengine.cache.tables import Table, TableBuilder
from diffengine.datasets import ImageTextDataset
from tests.engine.runs import build

VARIATIONS = 3  # of each image
CACHED = {"image_variations": VARIATIONS, "batch_size": 4, "max_iters": 30, "caption_dropout": 0.3}
CHECK = 8  # images that every start encodes again, as a check
BUILD = 1 + 10 * VARIATIONS  # images that a build encodes: the first one twice, to measure a row


def build_cached(toy, work_dir, *options, **settings):
    """Build a run with `CACHED` and these settings."""
    return build(toy.config("cached", **{**CACHED, **settings}), work_dir, *options)


def count_encoded(toy_copy, encoded, *options, **settings):
    """Start a run. Returns how many images and how many captions the start encoded."""
    encoded.update(images=0, captions=0)
    work_dir = toy_copy.root / "run"
    shutil.rmtree(work_dir, ignore_errors=True)
    cache = {"cache": True, "cache_path": str(toy_copy.root / "kept")}
    build_cached(toy_copy, work_dir, *options, **{**cache, **settings})
    return encoded["images"], encoded["captions"]


def tables(work_dir):
    """The tables of images and of captions in the only cache next to a work dir."""
    (folder,) = (work_dir.parent / "cache").iterdir()
    return Table(folder / "pictures.arrow"), Table(folder / "captions.arrow")


def table_bytes(root):
    """The content of every table in the caches under `root`, by file name."""
    return {file.name: file.read_bytes() for file in sorted(root.glob("cache/*/*.arrow"))}


FINGERPRINT = {"name": "test"}
ROWS = 30  # of a table by `write_table`


def write_table(file, chunks=None):
    """Build or repair a table of random ids. The chunks that were missing are added to the list `chunks`."""
    file.parent.mkdir(exist_ok=True)
    builder = TableBuilder(file, FINGERPRINT, ROWS)
    missing = builder.missing()
    builder.begin()
    for start, end in missing:
        ids = np.stack([np.random.default_rng(row).integers(0, 64, (8, 8), np.uint8) for row in range(start, end)])
        builder.write((start, end), {"token_ids": ids, "text": [[f"caption {row}"] for row in range(start, end)]})
    if chunks is not None:
        chunks += missing
    return builder.finish()


def flip(file, byte, bit=0):
    """Flip one bit of a file."""
    content = bytearray(file.read_bytes())
    content[byte] ^= 1 << bit
    file.write_bytes(content)


def image_files(toy_copy):
    return sorted(toy_copy.data.glob("*.*g"))


class NamedImages:
    """A data set with an entry that a table cannot store: a text other than the caption."""

    def __init__(self, path: str) -> None:
        self.inner = ImageTextDataset(path)

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return {**self.inner[index], "name": f"image {index}"}


class WeightedImages:
    """A data set with a weight on every other image: the even ones (`odd=0`) or the odd ones (`odd=1`)."""

    weight = 0.25

    def __init__(self, path: str, odd: int) -> None:
        self.inner, self.odd = ImageTextDataset(path), odd

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return {**self.inner[index], **({"weight": self.weight} if index % 2 == self.odd else {})}


def weighted_images(toy_copy, odd):
    """The config option that trains on `WeightedImages`."""
    dataset = {"type": "tests.cache.caches.WeightedImages", "path": str(toy_copy.data), "odd": odd}
    return f"train_dataloader.dataset={dataset}"
