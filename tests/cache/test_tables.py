"""Tables on disk: the types they store, and builds that continue after a kill."""

import random
import shutil
import signal
import time

import datasets as hf
import numpy as np
import pytest

from diffengine.cache import TokenCache, token_cache
from diffengine.cache import tables as cache_tables
from diffengine.cache.tables import Table, TableBuilder
from diffengine.errors import UserError
from tests.cache.caches import CACHED, VARIATIONS, build_cached, count_encoded, table_bytes, tables
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


def build_and_die(path, work_dir, seconds):
    """Build the cache in a process that dies `seconds` after the start of each table."""
    original = TokenCache._build

    def build_with_timer(cache, builder, write, what):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process at once, like SIGKILL
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return original(cache, builder, write, what)

    TokenCache._build = build_with_timer
    build(path, work_dir)


def test_a_build_killed_ten_times_continues_and_ends_equal(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_tables, "CHUNK", CHUNK)
    path = toy.config("killed", **{**CACHED, "image_variations": 16, "cache": True})
    durations, original = [], TokenCache._build

    def timed_build(cache, builder, write, what):
        began = time.perf_counter()
        table = original(cache, builder, write, what)
        durations.append(time.perf_counter() - began)
        return table

    monkeypatch.setattr(TokenCache, "_build", timed_build)
    build(path, tmp_path / "whole" / "run")
    monkeypatch.setattr(TokenCache, "_build", original)
    rng = random.Random(0)
    exit_codes, chunk_counts = [], []
    for _ in range(10):
        seconds = rng.uniform(0.01, durations[0] / 3)
        exit_codes.append(in_child(build_and_die, path, tmp_path / "killed" / "run", seconds))
        chunk_counts.append(len(list(tmp_path.glob("killed/cache/*/*.chunks/*.arrow"))))
        complete = [table.fingerprint is not None for table in tables(tmp_path / "killed" / "run")]
        assert complete[0] or not complete[1]
    assert exit_codes.count(-signal.SIGALRM) >= 3
    assert len({count for count in chunk_counts if 0 < count < 40}) >= 2  # some died between the first and last chunk
    build(path, tmp_path / "killed" / "run")
    assert table_bytes(tmp_path / "killed") == table_bytes(tmp_path / "whole")
    assert not list(tmp_path.glob("killed/cache/*/*.chunks*"))


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
