"""A damaged cache is noticed and repaired, at the start or in mid-run, and what is not ours is never deleted."""

import json
import os
import pickle
import resource
import shutil

import pytest
from mmengine.hooks import Hook

from diffengine import cli
from diffengine.cache import tables as cache_tables
from diffengine.cache.checked import read_json, write_json
from diffengine.cache.tables import Table
from diffengine.errors import UserError
from tests.cache.caches import CACHED, FINGERPRINT, VARIATIONS, count_encoded, flip, table_bytes, write_table
from tests.engine.runs import assert_equal_checkpoints, in_child, train

CHUNK = 4  # rows in a chunk


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(cache_tables, "CHUNK", CHUNK)


def test_each_flipped_bit_is_noticed(tmp_path):
    table = write_table(tmp_path / "table.arrow")
    assert table.change(FINGERPRINT) is None
    for file in (table.file, table.file.with_suffix(".json")):
        whole = file.read_bytes()
        for byte in [*range(0, len(whole), 31), len(whole) - 1]:
            flip(file, byte, bit=byte % 8)
            assert str(file) in Table(table.file).change(FINGERPRINT)
            file.write_bytes(whole)
    assert Table(table.file).change(FINGERPRINT) is None


@pytest.mark.parametrize(
    "change",
    [{"rows": 10**15}, {"rows": -1}, {"rows": "x"}, {"messages": []}, {"messages": 5}, {"messages": [[-5, "x"]] * 5},
     {"made_of": 5}],
    ids=str,
)  # fmt: skip
def test_a_json_file_that_describes_no_table_is_damage(tmp_path, change):
    """With a digest that fits, as anyone can make it."""
    file = write_table(tmp_path / "table.arrow").file
    content, _ = read_json(file.with_suffix(".json"))
    write_json(file.with_suffix(".json"), {**content, **change})
    assert Table(file).fingerprint is None
    assert Table(file).change(FINGERPRINT) == f"'{file}' is damaged"


def test_a_damaged_chunk_is_not_read(tmp_path):
    """A worker that never saw the check at the start notices it too."""
    table = write_table(tmp_path / "table.arrow")
    flip(table.file, table.file.read_bytes().index(table[9]["token_ids"].tobytes()))
    copy = pickle.loads(pickle.dumps(table))
    assert copy[7]["text"] == ["caption 7"]
    with pytest.raises(UserError, match=r"table\.arrow', damaged or changed since the start: its checksum differs"):
        copy[10]
    with pytest.raises(UserError, match="checksum"):
        list(copy.texts())


def truncate(file):
    os.truncate(file, 1700)


def replace_by_folder(file):
    file.unlink()
    file.mkdir()


def replace_by_pipe(file):
    file.unlink()
    os.mkfifo(file)


def append(file):
    file.write_bytes(file.read_bytes() + b"more")


@pytest.mark.parametrize(
    ("damage", "missing"),
    [
        (lambda file: flip(file, 1700), 1),
        (lambda file: flip(file, 100), 8),  # the schema, without which chunks mean nothing
        (lambda file: flip(file, -1), 0),  # the end
        (append, 0),
        (truncate, 6),
        (lambda file: os.truncate(file, 0), 8),
        (lambda file: file.unlink(), 8),
        (replace_by_folder, 8),
        (replace_by_pipe, 8),
        (lambda file: replace_by_folder(file.with_suffix(".json")), 8),
        (lambda file: shutil.copy(file.with_suffix(".json"), file), 8),
    ],
)
def test_only_what_is_damaged_is_built_again(tmp_path, damage, missing):
    table = write_table(tmp_path / "table.arrow")
    whole = {file: file.read_bytes() for file in tmp_path.iterdir()}
    damage(table.file)
    assert str(tmp_path / "table.") in Table(table.file).change(FINGERPRINT)
    chunks = []
    write_table(table.file, chunks)
    assert len(chunks) == missing
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == whole


def test_a_damaged_chunk_of_a_killed_build_is_built_again(tmp_path):
    whole = write_table(tmp_path / "whole.arrow").file.read_bytes()
    cut = (truncate, lambda file: file.write_bytes(b""), lambda file: file.unlink())
    for damage in (lambda file: flip(file, 900), *cut):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache_tables.TableBuilder, "finish", interrupt)
            with pytest.raises(KeyboardInterrupt):
                write_table(tmp_path / "table.arrow")
        chunks = []
        damage(next(tmp_path.glob("*.chunks")) / "000000004.arrow")
        assert write_table(tmp_path / "table.arrow", chunks).file.read_bytes() == whole
        assert chunks == [(4, 8)]
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


def interrupt(builder):
    raise KeyboardInterrupt


class Bomb:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("content", [
    b"", b"{", b"null", b"[1]", b"\xff\0", b"[" * 100_000, b"9" * 5000, b'{"format": 2}', b'{"format": "2"}',
    b'{"format": 2, "digest": 1, "content": {"rows": -1}}',
    b'{"format": 2, "digest": "", "content": {"rows": 1e300, "messages": [[-9, 0], [1000000000000000, 1]]}}',
    pickle.dumps(Bomb()),
])  # fmt: skip
def test_garbage_is_damage(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    table = write_table(tmp_path / "table.arrow")
    whole = table.file.read_bytes()
    for file in (table.file.with_suffix(".json"), table.file):
        file.write_bytes(content)
        assert Table(table.file).change(FINGERPRINT) == f"'{file}' is damaged"
        write_table(table.file)
        assert table.file.read_bytes() == whole
    assert not (tmp_path / "exploded").exists()


def test_a_json_file_of_another_name_or_version_is_not_used(tmp_path):
    write_json(tmp_path / "captions.json", {"rows": 3})
    assert read_json(tmp_path / "captions.json") == ({"rows": 3}, None)
    shutil.copy(tmp_path / "captions.json", tmp_path / "pictures.json")
    assert read_json(tmp_path / "pictures.json") == (None, f"'{tmp_path / 'pictures.json'}' is damaged")
    (tmp_path / "old.json").write_text(json.dumps({"format": 1, "bytes": 944, "shapes": {}, "made_of": {}}))
    assert read_json(tmp_path / "old.json") == (None, f"'{tmp_path / 'old.json'}' was written by another version")


# ------------------------------------------------------------------------------------------- runs


def test_a_damaged_cache_is_repaired_and_trains_the_same(toy_copy, encoded, capsys):
    kept = toy_copy.root / "kept"
    path = toy_copy.config("run", **{**CACHED, "max_iters": 3, "cache": True, "cache_path": str(kept)})
    assert train(path, toy_copy.root / "one") == 0
    whole = {file.name: file.read_bytes() for file in kept.glob("*.arrow")}
    for name in whole:
        flip(kept / name, len(whole[name]) // 2)
    flip(kept / "files.json", 200)
    encoded.update(images=0, captions=0)
    capsys.readouterr()
    assert train(path, toy_copy.root / "two") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "is damaged;" in line]
    assert lines == [
        f"token cache: '{kept / 'pictures.arrow'}' is damaged; encoding 4 of 30 image variations",
        f"token cache: '{kept / 'captions.arrow'}' is damaged; encoding 4 of 11 captions",
    ]
    assert encoded == {"images": 1 + CHUNK, "captions": CHUNK}  # one image, to measure a row
    assert {file.name: file.read_bytes() for file in kept.glob("*.arrow")} == whole
    assert_equal_checkpoints(toy_copy.root / "one" / "iter_3.pth", toy_copy.root / "two" / "iter_3.pth")


class Change(Hook):
    """Truncates or deletes files after the first step."""

    def __init__(self, files: list[str], delete: bool) -> None:
        self.files, self.delete = files, delete

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        for file in self.files if batch_idx == 0 else []:
            os.unlink(file) if self.delete else os.truncate(file, 0)


def test_tables_that_are_truncated_or_deleted_in_mid_run(toy, tmp_path, capsys):
    """A truncated one is an error of one line; a deleted one is open, so training goes on."""
    kept = tmp_path / "kept"
    path = toy.config("change", **{**CACHED, "max_iters": 5, "cache": True, "cache_path": str(kept)})

    def run(name, tables, delete, workers):
        hook = {"type": "tests.cache.test_damage.Change", "files": [str(file) for file in tables], "delete": delete}
        return train(path, tmp_path / name, "--cfg-options", f"custom_hooks=[{hook}]", f"num_workers={workers}")

    for name, workers in (("pictures.arrow", 1), ("captions.arrow", 0)):
        file = kept / name
        assert run(f"without-{name}", [file], False, workers) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"cannot read '{file}', damaged or changed since the start: it ends before byte" in error
    assert run("deleted", list(kept.glob("*.arrow")), True, 0) == 0
    assert run("whole", [], False, 0) == 0
    assert_equal_checkpoints(tmp_path / "deleted" / "iter_5.pth", tmp_path / "whole" / "iter_5.pth")


def limited(limit, path):
    """Build a cache in a process that can write no file of more bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return cli.main(["cache", path])


def test_a_full_disk_is_one_line_and_the_build_continues(toy, tmp_path, capfd):
    options = {"max_iters": 9, "cache": True, "work_dir": str(tmp_path / "run" / "work")}
    path = toy.config("full", **{**CACHED, **options})
    for limit, name in ((500, "000000000.arrow"), (2000, "pictures.arrow")):  # a chunk, and the table of all chunks
        assert in_child(limited, limit, path) == 2
        error = capfd.readouterr().err
        assert error.splitlines()[-1].startswith("diffengine cache: error: cannot read or write '")
        assert f"{name}': File too large" in error
        assert not list(tmp_path.rglob("*.tmp"))
        assert not list(tmp_path.rglob("pictures.arrow"))
    assert cli.main(["cache", path]) == 0
    other = toy.config("whole", **{**CACHED, **options, "work_dir": str(tmp_path / "other" / "work")})
    assert cli.main(["cache", other]) == 0
    assert table_bytes(tmp_path / "run") == table_bytes(tmp_path / "other")


def test_nothing_of_others_is_deleted(toy_copy, encoded):
    kept, outside = toy_copy.root / "kept", toy_copy.root / "outside"
    count_encoded(toy_copy, encoded)
    outside.mkdir()
    table = kept / "pictures.arrow"
    link, folder, old = (kept / f"{table.stem}-{end}.chunks" for end in ("0123456789ab", "holiday", "ba9876543210"))
    link.symlink_to(outside)
    for file in (
        outside / "000000000.arrow", folder / "000000000.arrow", old / "mine.txt", kept / "notes.txt",
        kept / "table.tmp",
    ):  # fmt: skip
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    ours = old / "000000000.arrow"
    ours.write_text("an old chunk")
    table.replace(outside / "table")
    table.symlink_to(outside / "table")  # as someone may do who moves it to another disk
    linked = (outside / "table").read_bytes()
    count_encoded(toy_copy, encoded, seed=1)
    files = [file for folder in (kept, outside) for file in folder.rglob("*") if file.is_file()]
    assert [file.read_bytes() for file in files].count(b"mine") == 5
    assert link.is_symlink()
    assert (outside / "table").read_bytes() == linked
    assert not table.is_symlink()
    assert not ours.exists()
    assert len(Table(table)) == 10 * VARIATIONS


def test_a_folder_with_files_in_the_way_is_reported(tmp_path):
    file = write_table(tmp_path / "table.arrow").file
    file.unlink()
    file.mkdir()
    (file / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"table\.arrow' is a folder; .* move the folder away"):
        write_table(file)
    assert (file / "mine.txt").read_text() == "mine"
