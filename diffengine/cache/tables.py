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
    """Rows of arrays, one shape per column, and of texts. What `table[row]` returns must not be changed."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._views: dict[int, dict[str, Any]] = {}  # by chunk

    def __reduce__(self) -> tuple[Any, ...]:
        return Table, (self.file,)  # a worker maps the file itself

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
        if chunk not in self._views:
            self._views[chunk] = self._view(self._batches[chunk])
        cells = {name: column[index] for name, column in self._views[chunk].items()}
        return {name: cell.as_py() if isinstance(cell, pa.Scalar) else cell for name, cell in cells.items()}

    def texts(self, step: int = 1) -> Iterator[list[str]]:
        """The column `text` of every `step`-th row."""
        column = hf.Dataset.from_file(str(self.file)).data.column("text")
        return (column[row].as_py() for row in range(0, len(column), step))

    @cached_property
    def _info(self) -> dict[str, Any] | None:
        try:
            info = json.loads(self.file.with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        complete = isinstance(info, dict) and info.get("format") == FORMAT and self.file.is_file()
        return info if complete and info.get("bytes") == self.nbytes else None  # a copy may be cut off

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        return hf.Dataset.from_file(str(self.file)).data.table.to_batches()

    def _view(self, batch: pa.RecordBatch) -> dict[str, Any]:
        assert self._info is not None
        columns = dict(zip(batch.schema.names, batch.columns))
        for name, shape in self._info["shapes"].items():
            columns[name] = columns[name].flatten().to_numpy(zero_copy_only=False).reshape(batch.num_rows, *shape)
        return columns


@final
class TableBuilder:
    """Writes a table chunk by chunk. Chunks of an earlier build with the same fingerprint (plain values) are kept."""

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
        self.file.with_suffix(".json").unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)
        self._folder.mkdir(parents=True, exist_ok=True)

    def missing(self) -> list[Rows]:
        """The chunks that are not written yet."""
        return [rows for rows in self.chunks if not self._chunk(rows).exists()]

    def write(self, rows: Rows, columns: Mapping[str, np.ndarray | list[list[str]]]) -> None:
        """Write one chunk: for each column an array (rows, ...), or a list of texts per row."""
        shapes = {name: list(values.shape[1:]) for name, values in columns.items() if isinstance(values, np.ndarray)}
        arrays = {name: _column(values) for name, values in columns.items()}
        batch = pa.RecordBatch.from_pydict(arrays, metadata={"shapes": json.dumps(shapes)})
        assert batch.num_rows == rows[1] - rows[0]
        _write_stream(self._chunk(rows), batch.schema, [batch])

    def finish(self) -> Table:
        """Join the chunks into the complete table and delete them."""
        with pa.memory_map(str(self._chunk(self.chunks[0]))) as first:
            schema = pa.ipc.open_stream(first).schema
        _write_stream(self.file, schema, self._read_chunks())
        table, shapes = Table(self.file), json.loads(schema.metadata[b"shapes"])
        info = {"format": FORMAT, "bytes": table.nbytes, "shapes": shapes, FINGERPRINT: self.fingerprint}
        write_text(self.file.with_suffix(".json"), json.dumps(info, indent=1))
        self.sweep()
        return table

    def sweep(self) -> None:
        """Delete the chunks left by a build that was killed after it finished its table."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _chunk(self, rows: Rows) -> Path:
        return self._folder / f"{rows[0]:09}.arrow"

    def _read_chunks(self) -> Iterator[pa.RecordBatch]:
        for rows in self.chunks:
            with pa.memory_map(str(self._chunk(rows))) as file:
                yield from pa.ipc.open_stream(file)


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
