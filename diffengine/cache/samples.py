"""How samples become rows of a table, and come back."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import final

import numpy as np
import torch

from diffengine.cache.tables import Table
from diffengine.datasets import ImageDataset, Sample, Source, UnreadableImage, as_list
from diffengine.datasets.base import Size
from diffengine.errors import require

DIMENSIONS = ".shape"  # the suffix of the column that has the shapes of a flattened one
SHAPE = "shape"  # the column of the images' shapes, (width, height) in pixels


@final
class CachedDataset(ImageDataset):
    """Every variation of every image after the image transforms, from the table's row `index * variations + variation`.

    Indexing returns only the caption, which is enough if the images are not on this machine.
    """

    def __init__(self, table: Table, variations: int, sources: Sequence[Source] | None = None) -> None:
        self._table = table
        self.variations: int = variations
        self._sources = sources

    @property
    def has_masks(self) -> bool:
        return "region" in self._table[0]

    @property
    def sources(self) -> Sequence[Source]:
        return super().sources if self._sources is None else self._sources

    def __len__(self) -> int:
        return len(self._table) // self.variations

    def __getitem__(self, index: int) -> Sample:
        return {"text": self.sample(index, 0)["text"]}

    def all_captions(self) -> Iterator[list[str]]:
        return self._table.texts(step=self.variations)

    def shapes(self) -> list[Size] | None:
        if SHAPE not in self._table[0]:
            return None
        return [tuple(shape.tolist()) for shape in self._table.column(SHAPE, step=self.variations)]

    def sample(self, index: int, visit: int) -> Sample:
        """The sample of an image after so many visits: its variations take turns. Tensors own their memory; `text` is a
        list.
        """
        row = self._table[index * self.variations + visit % self.variations]
        sample: Sample = {"text": row.pop("text")}
        if not row.pop("readable"):
            raise UnreadableImage(f"image {index} could not be read when the cache was built")
        row.pop(SHAPE, None)
        shapes = {name: row.pop(name + DIMENSIONS) for name in list(row) if name + DIMENSIONS in row}
        for name, value in row.items():
            if name in shapes:
                value = value[: math.prod(shapes[name])].reshape(shapes[name])  # type: ignore[arg-type,union-attr]
            if value.ndim > 0:  # type: ignore[union-attr]
                sample[name] = torch.from_numpy(value if value.base is None else value.copy())  # type: ignore[union-attr]
            elif name != "weight" or not math.isnan(value):  # type: ignore[arg-type]
                sample[name] = value.item()  # type: ignore[union-attr]
        return sample


def columns_of(
    samples: Sequence[Sample | None], template: Sample, flat: Mapping[str, int] | None = None
) -> dict[str, np.ndarray | list[list[str]]]:
    """Samples as columns: `readable`, `weight` and the template's keys. Rows of None are filled from the template.

    Args:
        flat: of arrays whose shapes differ, the names, and the length to which the flattened values are padded. The
            column NAME.shape has their shapes.
    """
    filled = [template if sample is None else sample for sample in samples]
    columns: dict[str, np.ndarray | list[list[str]]] = {
        "readable": np.array([sample is not None for sample in samples], dtype=np.uint8),
        "weight": np.array([float(sample.get("weight", math.nan)) for sample in filled]),
    }
    for sample in filled:
        uneven = ", ".join(sorted((sample.keys() ^ template.keys()) - {"weight"}))
        require(
            not uneven,
            f"only some samples have {uneven}; a cache needs it of all: add it, or set --cfg-options cache=False",
        )
    for key in (key for key in template if key not in ("image", "text", "weight")):
        values = [np.asarray(sample[key]) for sample in filled]
        if flat and key in flat:
            columns[key + DIMENSIONS] = np.array([value.shape for value in values], dtype=np.int32)
            values = [np.pad(value.ravel(), (0, max(0, flat[key] - value.size)))[: flat[key]] for value in values]
        columns[key] = np.stack(values)
    columns["text"] = [[] if sample is None else as_list(sample["text"]) for sample in samples]
    return columns
