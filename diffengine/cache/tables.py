"""Arrow tables on disk that are complete or not used.

A table is one Arrow file of rows of one size, memory-mapped, which `datasets.Dataset.from_file` opens too. Next to it
lies a JSON file with the fingerprint of what it was made from, written last. A table is built in chunks, so a build
that is killed continues with the next chunk.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, final

import datasets as hf
import numpy as np
import pyarrow as pa

from diffengine.cache.fingerprint import digest_of
from diffengine.files import atomic_write, write_text

Row = dict[str, np.ndarray | list[str]]
Rows = tuple[int, int]  # the first row, and the one after the last
CHUNK = 256  # rows: the most that a kill can lose of a build
FORMAT = 1
FINGERPRINT = "made_of"  # its key in the JSON file


@final
class Table:
    """Rows of arrays, one shape per column, and of texts. What `table[row]` returns must not be changed.

    Args:
        file: the Arrow file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    @property
    def fingerprint(self) -> dict[str, Any] | None:
        """What the rows were made from; None if the table is not complete."""
        return None if self._info is None else self._info[FINGERPRINT]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.file.stat().st_size

    @property
    def value_bytes(self) -> int:
        """Bytes of the values alone."""
        return sum(batch.nbytes for batch in self._batches)

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    def __getitem__(self, row: int) -> Row:
        chunk, index = divmod(row, CHUNK)
        views = self._views[chunk]
        if views is None:
            views = self._views[chunk] = self._view(self._batches[chunk])
        return {
            name: column[index] if isinstance(column, np.ndarray) else column[index].as_py()
            for name, column in views.items()
        }

    def texts(self, step: int = 1) -> Iterator[list[str]]:
        """The column `text` of every `step`-th row."""
        column = hf.Dataset.from_file(str(self.file)).data.column("text")
        return (column[row].as_py() for row in range(0, len(column), step))

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file}  # a worker maps the file itself

    @cached_property
    def _info(self) -> dict[str, Any] | None:
        try:
            info = json.loads(_json_of(self.file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        complete = isinstance(info, dict) and info.get("format") == FORMAT and self.file.is_file()
        return info if complete and info.get("bytes") == self.nbytes else None  # a copy may be cut off

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        return hf.Dataset.from_file(str(self.file)).data.table.to_batches()

    @cached_property
    def _views(self) -> list[dict[str, Any] | None]:
        return [None] * len(self._batches)

    def _view(self, batch: pa.RecordBatch) -> dict[str, Any]:
        assert self._info is not None
        shapes = self._info["shapes"]
        return {
            name: batch.column(name).flatten().to_numpy().reshape(batch.num_rows, *shapes[name])
            if name in shapes
            else batch.column(name)
            for name in batch.schema.names
        }


@final
class TableBuilder:
    """Writes a table chunk by chunk. Chunks of an earlier build with the same fingerprint are kept.

    Args:
        file: the table's Arrow file.
        fingerprint: plain values: everything that the rows depend on.
        num_rows: of the whole table.
    """

    def __init__(self, file: Path, fingerprint: dict[str, Any], num_rows: int) -> None:
        self.file = file
        self.fingerprint = fingerprint
        self.chunks: list[Rows] = [(start, min(start + CHUNK, num_rows)) for start in range(0, num_rows, CHUNK)]
        self._folder = file.with_name(f"{file.stem}-{digest_of(fingerprint)[:12]}.chunks")

    def begin(self) -> None:
        """Make the folder of chunks; delete the table and chunks of another fingerprint."""
        for folder in self.file.parent.glob(f"{self.file.stem}-*.chunks"):
            if folder != self._folder:
                shutil.rmtree(folder, ignore_errors=True)
        _json_of(self.file).unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)
        self._folder.mkdir(parents=True, exist_ok=True)

    def missing(self) -> list[Rows]:
        """The chunks that are not written yet."""
        return [rows for rows in self.chunks if not self._chunk(rows).exists()]

    def write(self, rows: Rows, columns: Mapping[str, np.ndarray | list[list[str]]]) -> None:
        """Write one chunk.

        Args:
            rows: which.
            columns: for each column an array (rows, ...), or a list of texts per row.
        """
        arrays = {name: values for name, values in columns.items() if isinstance(values, np.ndarray)}
        shapes = {name: list(values.shape[1:]) for name, values in arrays.items()}
        batch = pa.RecordBatch.from_pydict({name: _column(values) for name, values in columns.items()})
        assert batch.num_rows == rows[1] - rows[0]
        schema = batch.schema.with_metadata({"shapes": json.dumps(shapes)})
        _write_stream(self._chunk(rows), schema, [batch.replace_schema_metadata(schema.metadata)])

    def finish(self) -> Table:
        """Join the chunks into the complete table and delete them."""
        with pa.memory_map(str(self._chunk(self.chunks[0]))) as first:
            schema = pa.ipc.open_stream(first).schema
        _write_stream(self.file, schema, self._read_chunks())
        info = {
            "format": FORMAT,
            "bytes": Table(self.file).nbytes,
            "shapes": json.loads(schema.metadata[b"shapes"]),
            FINGERPRINT: self.fingerprint,
        }
        write_text(_json_of(self.file), json.dumps(info, indent=1))
        self.sweep()
        return Table(self.file)

    def sweep(self) -> None:
        """Delete the chunks that a build killed in its last moment left next to a complete table."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _chunk(self, rows: Rows) -> Path:
        return self._folder / f"{rows[0]:09}.arrow"

    def _read_chunks(self) -> Iterator[pa.RecordBatch]:
        for rows in self.chunks:
            with pa.memory_map(str(self._chunk(rows))) as file:
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
