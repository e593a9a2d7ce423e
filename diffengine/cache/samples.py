"""How samples become rows of a table, and come back."""

import math
from collections.abc import Iterator, Sequence
from typing import final

import numpy as np
import torch

from diffengine.cache.tables import Table
from diffengine.datasets import ImageDataset, Sample, UnreadableImage, as_list
from diffengine.errors import UserError


@final
class CachedDataset(ImageDataset):
    """Every variation of every image, as the stream has it after the image transforms.

    As a data set it has the captions alone: all that training needs of it if the images are elsewhere.

    Args:
        table: has the row `index * variations + variation`.
        variations: of each image.
    """

    def __init__(self, table: Table, variations: int) -> None:
        self._table = table
        self.variations: int = variations

    def __len__(self) -> int:
        return len(self._table) // self.variations

    def __getitem__(self, index: int) -> Sample:
        return {"text": self.sample(index, 0)["text"]}

    def all_captions(self) -> Iterator[list[str]]:
        return self._table.texts(step=self.variations)

    def sample(self, index: int, epoch: int) -> Sample:
        """The sample of an image in an epoch: its variations take turns. Tensors own their memory; `text` is a list.

        Raises:
            UnreadableImage: the image could not be read when the table was built.
        """
        row = self._table[index * self.variations + epoch % self.variations]
        if not row.pop("readable"):
            raise UnreadableImage(f"image {index} could not be read when the cache was built")
        text = row.pop("text")
        if math.isnan(row["weight"]):  # type: ignore[arg-type]
            del row["weight"]
        numbers = {name: value.item() for name, value in row.items() if value.ndim == 0}  # type: ignore[union-attr]
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in row.items() if name not in numbers}
        return {**tensors, **numbers, "text": text}


def columns_of(samples: Sequence[Sample | None], template: Sample) -> dict[str, np.ndarray | list[list[str]]]:
    """The columns of a table: tensors, numbers and texts of samples.

    Args:
        samples: None for one that cannot be read.
        template: a sample whose values fill the rows of those.

    Raises:
        UserError: samples have different keys, apart from `weight`, which not all need to have.
    """
    filled = [template if sample is None else sample for sample in samples]
    columns: dict[str, np.ndarray | list[list[str]]] = {
        "readable": np.array([sample is not None for sample in samples], dtype=np.uint8),
        "weight": np.array([float(sample.get("weight", math.nan)) for sample in filled]),
    }
    for sample in filled:
        if uneven := (sample.keys() ^ template.keys()) - {"weight"}:
            raise UserError(
                f"some samples of the data have {', '.join(sorted(uneven))} and some have not; a cache needs the same "
                "of all: give it to each, or set cache=False"
            )
    for key in (key for key in template if key not in ("image", "text", "weight")):
        columns[key] = np.stack([np.asarray(sample[key]) for sample in filled])
    columns["text"] = [[] if sample is None else as_list(sample["text"]) for sample in samples]
    return columns


def unstorable(sample: Sample) -> str | None:
    """The first entry of a sample that a table cannot hold, "name of type str"; None if it can hold all."""
    for key, value in sample.items():
        if key not in ("image", "text") and not isinstance(value, torch.Tensor | bool | int | float):
            return f"{key} of type {type(value).__name__}"
    return None
