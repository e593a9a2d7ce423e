"""Arrow tables on disk that are complete and intact, or not used.

A table is one Arrow file of rows of one size, which `datasets.Dataset.from_file` opens too: Arrow's messages, which are
a schema, chunks of rows, and an end. Next to it lies a JSON file with the fingerprint of what the table was made from
and the messages' checksums, written last. A table is built in chunks, so a build that is killed continues with the next
chunk, and of a damaged table only the damaged chunks are built again.

A process checks a chunk when it first reads it, and from then on reads only the rows that are asked for.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, final

import numpy as np
import pyarrow as pa

from diffengine.cache.checked import (
    OTHER_VERSION,
    OpenFile,
    checksum,
    digest_of,
    read_json,
    unreadable,
    write,
    write_json,
)
from diffengine.cache.fingerprint import difference
from diffengine.errors import UserError, require
from diffengine.signatures import Between, fits

Row = dict[str, np.ndarray | list[str]]
Rows = tuple[int, int]  # the first row, and the one after the last
CHUNK = 256  # rows: the most that a kill can lose of a build
KEPT = 32  # bytes of a row: narrower columns stay in memory, since a read takes longer than a copy
FINGERPRINT = "made_of"  # its key in the JSON file
END = b"\xff\xff\xff\xff\0\0\0\0"  # Arrow's last message
CHECKSUM = 16  # characters


def chunks_of(num_rows: int) -> list[Rows]:
    """The chunks of a table of so many rows."""
    return [(start, min(start + CHUNK, num_rows)) for start in range(0, num_rows, CHUNK)]


@final
class Table:
    """Rows of arrays, one shape per column, and of texts. What `table[row]` returns must not be changed.

    Reading raises a UserError where the file is damaged.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._views: dict[int, dict[str, Any]] = {}  # by chunk

    def __reduce__(self) -> tuple[Any, ...]:
        return Table, (self.file,)  # a worker opens the file itself

    @property
    def fingerprint(self) -> dict[str, Any] | None:
        """What the rows were made from; None if no table was completed here. The file may be damaged since."""
        return None if self._saved[0] is None else self._info[FINGERPRINT]

    @property
    def why_none(self) -> str | None:
        """Why there is no fingerprint; None if there is one."""
        return self._saved[1]

    @property
    def is_a_cache(self) -> bool:
        """Whether a cache of this or another version has written the table."""
        return self.why_none is None or OTHER_VERSION in self.why_none

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self._ends[-1]

    @property
    def value_bytes(self) -> int:
        """Bytes of the values alone."""
        return sum(self._batch(chunk)[0].nbytes for chunk in range(self._num_chunks))

    def __len__(self) -> int:
        return self._info["rows"]

    def __getitem__(self, row: int) -> Row:
        chunk, index = divmod(row, CHUNK)
        view = self._views.get(chunk) or self._view(chunk)
        cells = {name: column[index] for name, column in view.items()}
        cells["text"] = cells["text"].as_py()
        return cells

    def column(self, name: str, step: int = 1) -> Iterator[Any]:
        """The cells of a column in every `step`-th row."""
        return (self._view(row // CHUNK)[name][row % CHUNK] for row in range(0, len(self), step))

    def texts(self, step: int = 1) -> Iterator[list[str]]:
        """The column `text` of every `step`-th row."""
        return (cell.as_py() for cell in self.column("text", step))

    def change(self, fingerprint: Mapping[str, Any]) -> str | None:
        """Why the table has to be built again to have this fingerprint and be intact; None if it need not be."""
        return self.why_none or difference(self._info[FINGERPRINT], fingerprint) or self.damage()

    def damage(self) -> str | None:
        """What is wrong with the file, of which every byte is read; None if it is intact."""
        try:
            for chunk in range(self._num_chunks):
                self._view(chunk)
            intact = len(self.message(-1)) > 0 and self._opened.nbytes == self.nbytes
        except UserError:
            intact = False
        return None if intact else f"'{self.file}' is {'damaged' if self.file.exists() else 'missing'}"

    def message(self, number: int) -> np.ndarray:
        """The bytes of a message, checked: 0 is the schema, -1 the end, and the chunks lie in between."""
        size, expected = self._info["messages"][number]
        content = self._opened.read(np.empty(size, np.uint8), self._ends[number] - size)
        if checksum(content.data) != expected:
            raise unreadable(self.file, "its checksum differs")
        return content

    @property
    def _num_chunks(self) -> int:
        return len(self._info["messages"]) - 2

    @property
    def _info(self) -> dict[str, Any]:
        if self.why_none is not None:
            raise unreadable(self.file, self.why_none)
        return self._saved[0]

    @cached_property
    def _saved(self) -> tuple[Any, str | None]:
        found, why = read_json(self.file.with_suffix(".json"))
        return (None, f"'{self.file}' is damaged") if why is None and not _describes_table(found) else (found, why)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(size for size, _ in self._info["messages"]))

    @cached_property
    def _opened(self) -> OpenFile:
        return OpenFile(self.file)

    @cached_property
    def _schema(self) -> pa.Schema:
        return pa.ipc.read_schema(pa.py_buffer(self.message(0)))

    def _batch(self, chunk: int) -> tuple[pa.RecordBatch, np.ndarray]:
        """The rows of a chunk, and the memory that they lie in."""
        content = self.message(1 + chunk)
        return pa.ipc.read_record_batch(pa.py_buffer(content), self._schema), content

    def _view(self, chunk: int) -> dict[str, Any]:
        if chunk not in self._views:
            batch, content = self._batch(chunk)
            columns = dict(zip(batch.schema.names, batch.columns))
            for name, shape in json.loads(self._schema.metadata[b"shapes"]).items():
                values = columns[name].flatten().to_numpy(zero_copy_only=False).reshape(batch.num_rows, *shape)
                offset = values.ctypes.data - content.ctypes.data
                stored = 0 <= offset <= content.nbytes - values.nbytes  # bits are unpacked to bytes elsewhere
                wide = values.nbytes > KEPT * batch.num_rows
                if wide and stored:
                    columns[name] = _Column(self._opened, self._ends[chunk] + offset, values[0])
                else:
                    columns[name] = values.copy()
            columns["text"] = columns["text"].take(pa.array(range(batch.num_rows)))  # a copy, so `content` is freed
            self._views[chunk] = columns
        return self._views[chunk]


def _describes_table(found: Any) -> bool:
    """Whether the content of a table's JSON file has what `TableBuilder.finish` writes there."""
    hints = {"rows": Annotated[int, Between(1, 2**53)], "messages": list[list], FINGERPRINT: dict}
    if not isinstance(found, dict) or not all(fits(found.get(name), hint) for name, hint in hints.items()):
        return False
    sizes = [item[0] for item in found["messages"] if fits(item, tuple[Annotated[int, Between(0, 2**53)], str])]
    return len(sizes) == len(found["messages"]) == math.ceil(found["rows"] / CHUNK) + 2


@final
class _Column:
    """The rows of a column in a chunk, like `example`, each read from `offset` on when it is asked for."""

    def __init__(self, file: OpenFile, offset: int, example: np.ndarray) -> None:
        self._file, self._offset = file, offset
        self._shape, self._dtype, self._nbytes = example.shape, example.dtype, example.nbytes

    def __getitem__(self, index: int) -> np.ndarray:
        return self._file.read(np.empty(self._shape, self._dtype), self._offset + index * self._nbytes)


@final
class TableBuilder:
    """Writes a table chunk by chunk. Intact chunks of an earlier build or table of this fingerprint are kept."""

    def __init__(self, file: Path, fingerprint: dict[str, Any], num_rows: int) -> None:
        self.file = file
        self.fingerprint = fingerprint
        self.chunks = chunks_of(num_rows)
        self._folder = file.with_name(f"{file.stem}-{digest_of(fingerprint)[:12]}.chunks")

    @cached_property
    def kept(self) -> Table | None:
        """The table, perhaps damaged, if it was made from the same."""
        table = Table(self.file)
        if table.fingerprint is None or difference(table.fingerprint, self.fingerprint):
            return None
        try:
            table.message(0)
        except UserError:  # chunks mean nothing without their schema
            return None
        return table if len(table) == self.chunks[-1][1] else None

    def begin(self) -> None:
        """Make the folder of chunks; delete the table and chunks of another fingerprint."""
        for folder in self.file.parent.glob(f"{self.file.stem}-*.chunks"):
            if folder != self._folder:
                _delete_chunks(folder)
        if self.kept is None:
            delete_table(self.file)
        self._folder.mkdir(parents=True, exist_ok=True)

    def missing(self) -> list[Rows]:
        """The chunks that have to be written."""
        return [rows for rows in self.chunks if self._stored(rows) is None]

    def write(self, rows: Rows, columns: Mapping[str, np.ndarray | list[list[str]]]) -> None:
        """Write one chunk: for each column an array (rows, ...), or a list of texts per row."""
        shapes = {name: list(values.shape[1:]) for name, values in columns.items() if isinstance(values, np.ndarray)}
        arrays = {name: _column(values) for name, values in columns.items()}
        batch = pa.RecordBatch.from_pydict(arrays, metadata={"shapes": json.dumps(shapes)})
        assert batch.num_rows == rows[1] - rows[0]
        content = batch.schema.serialize().to_pybytes() + batch.serialize().to_pybytes()
        write(self._chunk(rows), [content, checksum(content).encode()])

    def finish(self) -> Table:
        """Join the chunks into the complete table and delete them."""
        messages: list[tuple[int, str]] = []

        def noted() -> Iterator[bytes]:
            for message in self._messages():
                messages.append((len(message), checksum(message)))
                yield message

        write(self.file, noted())
        info = {"rows": self.chunks[-1][1], "messages": messages, FINGERPRINT: self.fingerprint}
        write_json(self.file.with_suffix(".json"), info)
        self.sweep()
        return Table(self.file)

    def _messages(self) -> Iterator[bytes]:
        """The messages of the complete table."""
        schema = None
        for rows in self.chunks:
            stored = self._stored(rows)
            fits = stored is not None and schema in (None, stored[0])
            require(fits, f"the chunks of '{self.file}' do not fit each other; delete '{self.file.parent}'")
            assert stored is not None
            if schema is None:
                schema = stored[0]
                yield schema
            yield stored[1]
        yield END

    def sweep(self) -> None:
        """Delete the chunks left by a build that was killed after it finished its table."""
        _delete_chunks(self._folder)

    def _chunk(self, rows: Rows) -> Path:
        return self._folder / f"{rows[0]:09}.arrow"

    def _stored(self, rows: Rows) -> tuple[bytes, bytes] | None:
        """The schema and a chunk, from the chunk's file or the kept table; None if neither has it intact."""
        with suppress(OSError):
            file = self._chunk(rows).read_bytes()
            content, expected = file[:-CHECKSUM], file[-CHECKSUM:]
            if checksum(content).encode() == expected:
                size = 8 + int.from_bytes(content[4:8], "little")  # a message starts with a marker and its size
                return content[:size], content[size:]
        with suppress(UserError):
            if self.kept is not None:
                return self.kept.message(0).tobytes(), self.kept.message(1 + rows[0] // CHUNK).tobytes()
        return None


def delete_table(file: Path) -> None:
    """Delete a table, first the file that makes it complete."""
    for path in (file.with_suffix(".json"), file):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)


def _delete_chunks(folder: Path) -> None:
    """Delete a folder of chunks, if it can be and holds nothing else."""
    if re.fullmatch(r".*-[0-9a-f]{12}\.chunks", folder.name) and not folder.is_symlink():
        with suppress(OSError):
            for file in folder.iterdir():
                if re.fullmatch(r"\d{9}\.arrow|\.\d{9}\.arrow\.tmp", file.name):
                    file.unlink()
            folder.rmdir()


def _column(values: np.ndarray | list[list[str]]) -> pa.Array:
    if not isinstance(values, np.ndarray):
        return pa.array(values, pa.list_(pa.string()))
    size = int(np.prod(values.shape[1:]))
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), size)
