"""What is computed once of images and captions, and kept on disk.

A table is one Arrow file of rows of one size, memory-mapped, which `datasets.Dataset.from_file` opens too.
Beside it lies a JSON file that says what it was made of, written last: a table is complete, or is not used.
It is built in parts, so that a build that is killed goes on with the next part.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, final

import datasets as hf
import numpy as np
import pyarrow as pa
import torch

from diffengine.datasets.images import Sample, UnreadableImage, texts_in
from diffengine.errors import UserError
from diffengine.files import atomic_write, write_text

Row = dict[str, np.ndarray | list[str]]
PART = 256  # rows: what a kill can lose of a build
FORMAT = 1


# ------------------------------------------------------------------------------------------------ tables


@final
class Table:
    """Rows of arrays, one shape for each column, and of texts. What `table[row]` gives must not be changed.

    file: the Arrow file; the JSON file lies beside it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    @property
    def made_of(self) -> dict[str, Any] | None:
        """What the rows were made of; None where the table is not complete."""
        return None if self._about is None else self._about["made_of"]

    @property
    def nbytes(self) -> int:
        """On disk."""
        return self.file.stat().st_size

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    def __getitem__(self, row: int) -> Row:
        index, inside = divmod(row, PART)
        views = self._views[index]
        if views is None:
            views = self._views[index] = self._view(self._batches[index])
        return {
            name: column[inside] if isinstance(column, np.ndarray) else column[inside].as_py()
            for name, column in views.items()
        }

    def texts(self, start: int = 0, step: int = 1) -> Iterator[list[str]]:
        """The column `text` of every `step`-th row."""
        column = hf.Dataset.from_file(str(self.file)).data.column("text")
        return (column[row].as_py() for row in range(start, len(column), step))

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file}  # a worker maps it itself

    @cached_property
    def _about(self) -> dict[str, Any] | None:
        try:
            about = json.loads(_json_of(self.file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(about, dict) and about.get("format") == FORMAT and self.file.is_file()
        return about if whole and about.get("bytes") == self.nbytes else None  # a copy may have broken off

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        return hf.Dataset.from_file(str(self.file)).data.table.to_batches()

    @cached_property
    def _views(self) -> list[dict[str, Any] | None]:
        return [None] * len(self._batches)

    def _view(self, batch: pa.RecordBatch) -> dict[str, Any]:
        assert self._about is not None
        shapes = self._about["shapes"]
        return {
            name: batch.column(name).flatten().to_numpy().reshape(batch.num_rows, *shapes[name])
            if name in shapes
            else batch.column(name)
            for name in batch.schema.names
        }


@final
class TableBuilder:
    """Writes a table part by part; parts of the same making that are there already stay.

    file: the table's. made_of: plain values, what the rows depend on. num_rows: of the whole table.
    """

    def __init__(self, file: Path, made_of: dict[str, Any], num_rows: int) -> None:
        self.file = file
        self.made_of = made_of
        self.parts = [
            (start, min(start + PART, num_rows)) for start in range(0, num_rows, PART)
        ]  # (first row, last + 1)
        self._folder = file.with_name(f"{file.stem}-{digest_of(made_of)[:12]}.parts")

    def begin(self) -> None:
        """Make the folder; a table or parts of another making go."""
        for folder in self.file.parent.glob(f"{self.file.stem}-*.parts"):
            if folder != self._folder:
                shutil.rmtree(folder, ignore_errors=True)
        _json_of(self.file).unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)
        self._folder.mkdir(parents=True, exist_ok=True)

    def missing(self) -> list[tuple[int, int]]:
        """The parts that are not there."""
        return [part for part in self.parts if not self._part(part).exists()]

    def write(self, part: tuple[int, int], columns: Mapping[str, np.ndarray | list[list[str]]]) -> None:
        """One part: for each column an array (rows, ...), or a list of texts for each row."""
        shapes = {name: list(values.shape[1:]) for name, values in columns.items() if isinstance(values, np.ndarray)}
        batch = pa.RecordBatch.from_pydict({name: _column(values) for name, values in columns.items()})
        assert batch.num_rows == part[1] - part[0]
        schema = batch.schema.with_metadata({"shapes": json.dumps(shapes)})
        _write_stream(self._part(part), schema, [batch.replace_schema_metadata(schema.metadata)])

    def finish(self) -> Table:
        """The complete table; its parts go."""
        with pa.memory_map(str(self._part(self.parts[0]))) as first:
            schema = pa.ipc.open_stream(first).schema
        _write_stream(self.file, schema, self._read_parts())
        about = {
            "format": FORMAT,
            "bytes": Table(self.file).nbytes,
            "shapes": json.loads(schema.metadata[b"shapes"]),
            "made_of": self.made_of,
        }
        write_text(_json_of(self.file), json.dumps(about, indent=1))
        shutil.rmtree(self._folder, ignore_errors=True)
        return Table(self.file)

    def sweep(self) -> None:
        """Remove what a build that was killed in its last moment has left beside a complete table."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _part(self, part: tuple[int, int]) -> Path:
        return self._folder / f"{part[0]:09}.arrow"

    def _read_parts(self) -> Iterator[pa.RecordBatch]:
        for part in self.parts:
            with pa.memory_map(str(self._part(part))) as file:
                yield from pa.ipc.open_stream(file)


def _json_of(file: Path) -> Path:
    return file.with_suffix(".json")


def _column(values: np.ndarray | list[list[str]]) -> pa.Array:
    if not isinstance(values, np.ndarray):
        return pa.array(values, pa.list_(pa.string()))
    size = int(np.prod(values.shape[1:]))
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), size)


def _write_stream(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write batches to a file of Arrow's stream format, atomically."""
    with atomic_write(path) as temporary, pa.ipc.new_stream(str(temporary), schema) as stream:
        for batch in batches:
            stream.write_batch(batch)


# ----------------------------------------------------------------------------------------------- images


@final
class CachedForms:
    """Every form of every image, as the stream has it after the image transforms: its `forms`.

    table: row `index * count + variation`. count: forms of an image.
    """

    def __init__(self, table: Table, count: int) -> None:
        self.table = table
        self.count = count

    def sample(self, index: int, epoch: int) -> Sample:
        """Its form in an epoch: forms take turns. Tensors of their own memory, `text` a list, and numbers.

        Raises UnreadableImage for an image that could not be read when the table was built.
        """
        row = self.table[index * self.count + epoch % self.count]
        if not row.pop("readable"):
            raise UnreadableImage(f"image {index} could not be read when the cache was built")
        text = row.pop("text")
        if math.isnan(row["weight"]):  # type: ignore[arg-type]
            del row["weight"]
        numbers = {name: value.item() for name, value in row.items() if value.ndim == 0}  # type: ignore[union-attr]
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in row.items() if name not in numbers}
        return {**tensors, **numbers, "text": text}


def columns_of(samples: Sequence[Sample | None], template: Sample) -> dict[str, np.ndarray | list[list[str]]]:
    """What a table keeps of samples, None for one that cannot be read: tensors, numbers and texts.

    template: a sample whose values stand where there is none; of its other keys there must be `image` only.
    Raises UserError where samples have other keys than it, but for `weight`, which not all need to have.
    """
    filled = [template if sample is None else sample for sample in samples]
    columns: dict[str, np.ndarray | list[list[str]]] = {
        "readable": np.array([sample is not None for sample in samples], dtype=np.uint8),
        "weight": np.array([float(sample.get("weight", math.nan)) for sample in filled]),
    }
    for other in filled:
        if uneven := (other.keys() ^ template.keys()) - {"weight"}:
            raise UserError(
                f"some samples of the data have {', '.join(sorted(uneven))} and some have not; a cache needs "
                "the same of all: give it to each, or set cache=False"
            )
    for key in (key for key in template if key not in ("image", "text", "weight")):
        columns[key] = np.stack([np.asarray(sample[key]) for sample in filled])
    columns["text"] = [[] if sample is None else texts_in(sample["text"]) for sample in samples]
    return columns


def what_no_table_keeps(sample: Sample) -> str | None:
    """The first of a sample's keys whose value is no tensor and no number, and its type."""
    for key, value in sample.items():
        if key not in ("image", "text") and not isinstance(value, torch.Tensor | bool | int | float):
            return f"{key} of type {type(value).__name__}"
    return None


@final
class CachedDataset:
    """The captions of a cache whose images are elsewhere: what training from it needs of a data set."""

    def __init__(self, forms: CachedForms) -> None:
        self._forms = forms

    @property
    def forms(self) -> int:
        """Of each image."""
        return self._forms.count

    def __len__(self) -> int:
        return len(self._forms.table) // self._forms.count

    def __getitem__(self, index: int) -> Sample:
        return {"text": self._forms.sample(index, 0)["text"]}

    def captions(self) -> Iterator[str]:
        """Every caption, in order."""
        return (text for texts in self._forms.table.texts(step=self._forms.count) for text in texts)


# -------------------------------------------------------------------------------------------- fingerprints


def digest_of(value: Any) -> str:
    """Of plain values, by their JSON."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def digest_of_texts(texts: Iterable[str | list[str]]) -> str:
    """Of texts, or lists of them, in their order; a list of one is as that one."""
    digest = hashlib.blake2b(digest_size=16)
    for item in texts:
        pieces = [text.encode() for text in texts_in(item)]
        for number in (len(pieces), *map(len, pieces)):
            digest.update(number.to_bytes(8, "little"))
        digest.update(b"".join(pieces))
    return digest.hexdigest()


def texts_of(dataset: Any) -> Iterator[str | list[str]]:
    """The caption of each image, or its captions.

    Of a data set without `texts()`, `captions()` has one for each; one without both is read through.
    """
    if hasattr(dataset, "texts"):
        return dataset.texts()
    if hasattr(dataset, "captions"):
        return dataset.captions()
    return (dataset[index]["text"] for index in range(len(dataset)))


def captions_of(dataset: Any) -> Iterator[str]:
    """Every caption of a data set, lists flattened."""
    return (text for item in texts_of(dataset) for text in texts_in(item))


def digest_of_images(dataset: Any, notes: Path) -> str:
    """Of the bytes of a data set's images, in their order.

    Files that have the path, size and time noted in `notes` by an earlier call are not read again. A data set
    without `files()` is read through, image by image.
    """
    files = dataset.files() if hasattr(dataset, "files") else None
    if files is None:
        return digest_of_texts(_pixels(dataset, index) for index in range(len(dataset)))
    known = _read_notes(notes)
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to the other threads
        noted = list(pool.map(lambda file: _note(file, known.get(str(file))), files))
    if {note[0]: note for note in noted} != known:
        write_text(notes, json.dumps(noted))
    return digest_of([note[3] for note in noted])


def _pixels(dataset: Any, index: int) -> str:
    try:
        pixels = np.asarray(dataset[index]["image"])
    except UnreadableImage:  # the stream says what becomes of it
        return "unreadable"
    return f"{pixels.shape} {hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest()}"


Note = list[Any]  # path, size in bytes, time in nanoseconds, digest


def _read_notes(notes: Path) -> dict[str, Note]:
    try:
        return {note[0]: note for note in json.loads(notes.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, LookupError):
        return {}


def _note(file: Path, known: Note | None) -> Note:
    try:
        about = file.stat()
        if known is not None and known[1:3] == [about.st_size, about.st_mtime_ns]:
            return known
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read '{file}': {error.strerror}") from error
    return [str(file), about.st_size, about.st_mtime_ns, digest]
