"""What stands in, in a rehearsal, for what a run would first have to make: class images, a token cache."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from diffengine import distributed
from diffengine.cache.fingerprint import difference, digest_of_texts
from diffengine.cache.samples import CachedSamples, columns_of
from diffengine.cache.tables import CHUNK, TableBuilder
from diffengine.cache.token_cache import (
    Plan,
    _first_readable,
    distinct_captions,
    encode,
    image_table,
    make_plan,
    obstacle,
    stores_embeddings,
)
from diffengine.datasets import ImageDataset, Sample, Stream, UnreadableImage, as_list
from diffengine.engine.assemble import Parts, check_can_draw
from diffengine.engine.measure import nbytes, tensors_in
from diffengine.engine.micro import free_memory
from diffengine.errors import UserError

SAMPLED = 4 * 10**6  # bytes of rows that are written to see how long a cache's are


@dataclass
class CacheFigures:
    """The token cache that the run would train from.

    Attributes:
        folder: its folder.
        rows, captions: forms of images, and distinct captions, in it.
        size: bytes of both tables.
        there: whether it is there; a run still looks whether its images changed.
        seconds: to build it, by all processes together.
    """

    folder: Path
    rows: int
    captions: int
    size: int
    there: bool
    seconds: float


def stand_in_for_missing(parts: Parts) -> int:
    """How many images the data set waits for, once something stands in for them."""
    dataset: Any = parts.loop.stream.dataset
    missing = dataset.missing_images()
    if missing is None or not missing.numbers:
        return 0
    check_can_draw(missing, parts.model)
    parts.loop.stream.dataset = Incomplete(dataset)
    return len(missing.numbers)


@final
class Incomplete(ImageDataset):
    """A data set that waits for images, with its first one in the place of those."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        try:
            return self._dataset[index]
        except UnreadableImage:
            raise
        except UserError:
            return self._dataset[0]

    def size(self, index: int) -> tuple[int, int]:
        """(width, height)."""
        return self[index]["image"].size

    def all_captions(self) -> Iterator[list[str]]:
        """Also those of what is missing."""
        return self._dataset.all_captions()


@final
class FewForms:
    """A few samples in the place of all forms: of the same shapes, and read as fast as from a cache."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __call__(self, index: int, epoch: int) -> Sample:
        return dict(self.samples[(index + epoch) % len(self.samples)])


def stand_in_for_cache(
    parts: Parts, resolved: Mapping[str, Any], work_dir: Path, scratch: Path
) -> tuple[CacheFigures | None, str]:
    """The cache that the run would take, a few of its rows put in its place; or None, and why not."""
    stream, positions = parts.loop.stream, parts.loop.max_iters * parts.loop.batch_size
    cache, encoder, optim = parts.cache, parts.model.encoder, parts.optim
    reason = obstacle(cache, stream, encoder, positions)
    if reason and (cache.use is True):
        raise UserError(f"the cache cannot be used: {reason}")
    if reason or encoder is None:
        return None, reason or ""
    data = resolved["train_dataloader"]
    found = make_plan(cache, stream, encoder, data, work_dir, optim.precision, optim.autocast)
    table = image_table(found.folder)
    images = (table.fingerprint or {}).get("pictures")  # whose bytes only a run looks at
    captions = distinct_captions(stream)
    fingerprint = {
        "pictures": images, "captions": digest_of_texts(stream.dataset.all_captions()), **found.key,
    }  # fmt: skip
    there = difference(table.fingerprint, fingerprint) is None
    workers = parts.loop.dataloader.num_workers

    def put_in() -> CacheFigures:
        rows = len(stream.dataset) * found.variations
        samples, each = _some_samples(stream, found, workers)
        texts, encoded, each_caption = _some_captions(parts, found, captions, samples)
        found.encoder.to_host()
        free_memory()
        stream.cached_sample = FewForms(samples)
        found.encoder.use_captions(dict(zip(texts, encoded)).get)
        return CacheFigures(
            folder=found.folder,
            rows=rows,
            captions=len(captions),
            size=(table.nbytes if there else _table_bytes(scratch, samples, rows))
            + _table_bytes(scratch, [{**row, "text": ""} for row in encoded], len(captions), captions),
            there=there,
            seconds=0.0 if there else (rows * each + len(captions) * each_caption) / distributed.world_size(),
        )

    with distributed.all_ranks():
        return put_in(), ""


def _some_samples(stream: Stream, found: Plan, workers: int) -> tuple[list[Sample], float]:
    """Encoded forms of images spread over the data, or of its cache's; and the seconds that one takes."""
    encoder, count = found.encoder, len(stream.dataset) * found.variations
    rows = np.unique(np.linspace(0, count - 1, encoder.batch_size).round().astype(int)).tolist()
    if found.without_images:
        kept = CachedSamples(image_table(found.folder), found.variations)
        return [kept(*divmod(row, found.variations)) for row in rows], 0.0
    samples = [sample for sample in encode(stream.read_variations(rows), encoder) if sample is not None]
    began = time.perf_counter()  # the first time loads and warms up
    together = stream.read_variations(list(range(min(count, encoder.batch_size))))  # as a build reads them
    read = time.perf_counter() - began
    encode(together, encoder)
    encoded = time.perf_counter() - began - read
    seconds = max(read / workers, encoded) if workers else read + encoded
    return samples or [_first_readable(found)], seconds / len(together)


def _some_captions(
    parts: Parts, found: Plan, captions: list[str], samples: list[Sample]
) -> tuple[list[str], list[dict[str, Any]], float]:
    """The captions of these samples, what the encoder makes of them, and the seconds that one takes."""
    encoder = found.encoder
    embeddings = stores_embeddings(parts.cache.text_embeddings, len(captions), encoder.embedding_bytes)
    of_samples = (text for sample in samples for text in as_list(sample["text"]))
    texts = list(dict.fromkeys(["", *of_samples]))
    with parts.optim.autocast():
        encoder.encode_captions([""], embeddings)  # loads and warms up
        began = time.perf_counter()
        columns = encoder.encode_captions(texts, embeddings)
    seconds = (time.perf_counter() - began) / len(texts)
    rows = [{name: column[row].numpy() for name, column in columns.items()} for row in range(len(texts))]
    return texts, rows, seconds


def _table_bytes(scratch: Path, samples: list[Sample], rows: int, texts: list[str] | None = None) -> int:
    """Of a table of so many rows like these: a small one is written, and its size multiplied.

    Args:
        texts: of the rows, where the samples' own are not theirs.
    """
    tensors = [
        {key: torch.as_tensor(value) if isinstance(value, np.ndarray) else value for key, value in sample.items()}
        for sample in samples
    ]
    width = nbytes(tensors_in(tensors[0]))
    count = min(rows, CHUNK, max(1, SAMPLED // max(1, width)))
    columns = columns_of([tensors[row % len(tensors)] for row in range(count)], tensors[0])
    if texts is not None:
        columns = {name: column for name, column in columns.items() if name not in ("readable", "weight")}
        columns["text"] = [[text] for text in texts[:count]]
    builder = TableBuilder(scratch / "rows.arrow", {}, count)
    builder.begin()
    builder.write((0, count), columns)
    return builder.finish().nbytes * rows // count
