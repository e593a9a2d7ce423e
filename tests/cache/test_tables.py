"""Tables on disk: the types they store, and builds that continue after a kill."""

import os
import shutil
import signal
import sys

import datasets as hf
import numpy as np
import pytest

from diffengine.cache import TokenCache, token_cache
from diffengine.cache import tables as cache_tables
from diffengine.cache.tables import Table, TableBuilder
from diffengine.errors import UserError
from tests.cache.caches import (
    CACHED,
    FINGERPRINT,
    VARIATIONS,
    build_cached,
    count_encoded,
    flip,
    table_bytes,
    tables,
    write_table,
)
from tests.engine.runs import build, in_child

CHUNK = 4  # rows in a chunk, in tests of several chunks


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float32"])
def test_columns_read_back_equal(tmp_path, monkeypatch, dtype, shape):
    monkeypatch.setattr(cache_tables, "CHUNK", CHUNK)
    values = np.random.default_rng(0).integers(0, 2, (10, *shape)).astype(dtype)
    texts = [[f"caption {row}", ""][: row % 3] for row in range(10)]
    builder = TableBuilder(tmp_path / "table.arrow", {"name": "test"}, 10)
    builder.begin()
    for start, end in builder.missing():
        builder.write((start, end), {"values": values[start:end], "text": texts[start:end]})
    table = builder.finish()
    assert len(table) == 10
    assert table.fingerprint == {"name": "test"}
    for row in range(10):
        assert table[row]["values"].dtype == values.dtype
        np.testing.assert_array_equal(table[row]["values"], values[row])
        assert table[row]["text"] == texts[row]


def test_a_table_opens_as_a_data_set_and_stores_the_smallest_types(toy, tmp_path):
    build_cached(toy, tmp_path / "run", cache=True)
    images, captions = tables(tmp_path / "run")
    rows = hf.Dataset.from_file(str(images.file))
    assert len(rows) == len(images) == 10 * VARIATIONS
    assert rows.features["token_ids"].feature.dtype == "uint8"
    assert np.array_equal(np.array(rows[7]["token_ids"]).reshape(8, 8), images[7]["token_ids"])
    texts = hf.Dataset.from_file(str(captions.file))["text"]
    assert [""] in list(texts)
    assert len(texts) == len({text for (text,) in texts})


# ------------------------------------------------------------------------------------------- interrupted builds


class Countdown:
    """Counts calls and returns of Python functions, for `sys.setprofile`; kills the process at one of them."""

    def __init__(self, last: int | None = None) -> None:
        self.count, self.last = 0, last

    def __call__(self, frame, event, arg):
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def counted(countdown, work, *args):
    """Call `work` under a countdown."""
    sys.setprofile(countdown)
    try:
        return work(*args)
    finally:
        sys.setprofile(None)


def build_counted(path, work_dir, countdown):
    """Build a run; the countdown counts while chunks are encoded and written."""
    original = TokenCache._build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenCache, "_build", lambda *args: counted(countdown, original, *args))
        build(path, work_dir)


def test_a_build_killed_four_times_continues_and_ends_equal(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_tables, "CHUNK", CHUNK)
    path = toy.config("killed", **{**CACHED, "image_variations": 16, "cache": True})
    whole = Countdown()
    build_counted(path, tmp_path / "whole" / "run", whole)
    chunk_counts = []
    for share in (0.1, 0.2, 0.15, 0.2):
        killed = tmp_path / "killed" / "run"
        assert in_child(build_counted, path, killed, Countdown(int(share * whole.count))) == -signal.SIGKILL
        chunk_counts.append(len(list(tmp_path.glob("killed/cache/*/*.chunks/*.arrow"))))
        assert [table.fingerprint for table in tables(killed)] == [None, None]
    assert 0 < chunk_counts[0] < chunk_counts[1] < chunk_counts[2] < chunk_counts[3] < 40
    build(path, tmp_path / "killed" / "run")
    assert table_bytes(tmp_path / "killed") == table_bytes(tmp_path / "whole")
    assert not list(tmp_path.glob("killed/cache/*/*.chunks*"))


@pytest.mark.parametrize("damaged", [False, True])
def test_a_table_killed_at_any_moment_is_complete_or_not_used(tmp_path, monkeypatch, damaged):
    """Whether it is built or repaired."""
    monkeypatch.setattr(cache_tables, "CHUNK", CHUNK)
    whole = write_table(tmp_path / "whole" / "table.arrow").file.read_bytes()

    def prepare(folder):
        file = folder / "table.arrow"
        if damaged:
            shutil.copytree(tmp_path / "whole", folder)
            flip(file, len(whole) // 2)
        else:
            folder.mkdir()
        return file

    steps = Countdown()
    counted(steps, write_table, prepare(tmp_path / "counted"))
    for number in range(12):
        file = prepare(tmp_path / str(number))
        countdown = Countdown(1 + number * steps.count // 12)
        assert in_child(counted, countdown, write_table, file) == -signal.SIGKILL
        table = Table(file)
        assert table.change(FINGERPRINT) is not None or file.read_bytes() == whole
        assert write_table(file).change(FINGERPRINT) is None
        assert file.read_bytes() == whole


def interrupt(builder):
    raise KeyboardInterrupt


def test_a_finished_chunk_is_not_encoded_again(toy_copy, encoded, monkeypatch):
    monkeypatch.setattr(cache_tables, "CHUNK", CHUNK)
    with monkeypatch.context() as killed:
        killed.setattr(TableBuilder, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            count_encoded(toy_copy, encoded)
    assert len(list(toy_copy.root.glob("kept/*.chunks/*.arrow"))) == 8
    assert count_encoded(toy_copy, encoded) == (1, 11)  # one image, to measure a row
    assert len(Table(toy_copy.root / "kept" / "pictures.arrow")) == 30


def test_a_continued_build_needs_disk_space_only_for_the_rest(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_tables, "CHUNK", CHUNK)
    options = {"cache": True, "cache_path": str(tmp_path / "kept")}
    with monkeypatch.context() as killed:
        killed.setattr(TableBuilder, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_cached(toy, tmp_path / "run", **options)
    row_bytes = 1 + 8 + 64 + 5 * 4  # readable, weight, token ids, micro-conditions
    usage = shutil.disk_usage(tmp_path)
    needed = 10 * VARIATIONS * row_bytes
    monkeypatch.setattr(token_cache.shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(UserError, match="the cache needs"):
        build_cached(toy, tmp_path / "run", **options)
    monkeypatch.setattr(token_cache.shutil, "disk_usage", lambda path: usage._replace(free=needed))
    build_cached(toy, tmp_path / "run", **options)
