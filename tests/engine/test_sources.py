"""A run over several sources: the same online, cached, resumed and without the images; and a row for each source."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from diffengine import distributed
from diffengine.cli import main
from tests.engine import runs
from tests.engine.runs import Toy, assert_equal_checkpoints, in_child, results, signal_at, train
from tests.support import photos


@pytest.fixture(scope="module")
def data(toy: Toy) -> list[dict[str, Any]]:
    """Two sources: twelve images each taken twice, and forty of half the weight, mirrored half of the time."""
    for name, count, size in (("few", 12, 40), ("many", 40, 32)):
        photos.write_photo_folder(toy.root / name, count, size, "txt")
    few, many = (str(toy.root / name) for name in ("few", "many"))
    return [{"path": few, "repeats": 2}, {"path": many, "weight": 0.5, "mirror": 0.5, "prefix": "many: "}]


def config(toy: Toy, name: str, data: Any, **settings: Any) -> str:
    return toy.config(
        name, data=data, **{"flip": 0.0, "max_iters": 6, "log_every": 3, "image_variations": 2, **settings}
    )


def test_cached_is_online_and_resumed_is_whole(
    toy: Toy, data: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = {"validation_every": 4, "max_iters": 4, "checkpoint_every": 2}
    online = config(toy, "online", data, cache=False, **settings)
    assert train(online, tmp_path / "online") == 0
    output = capsys.readouterr().out
    assert "online: 44 images, 53 samples an epoch, 4 steps of 4" in output
    assert "source few: 9 of 12 images, 18 samples an epoch, weight 1\n" in output
    cached = config(toy, "cached", data, cache=True, cache_path=str(tmp_path / "cache"), **settings)
    assert in_child(train, cached, tmp_path / "cached", "--cfg-options", signal_at(3, signal.SIGKILL)) == -9
    assert train(cached, tmp_path / "cached", "--resume") == 0
    assert_equal_checkpoints(tmp_path / "online" / "iter_4.pth", tmp_path / "cached" / "iter_4.pth")
    lines = results(tmp_path / "online")
    for line, other in zip(lines, results(tmp_path / "cached")):
        assert line == pytest.approx(
            other, rel=1e-6 if "val/loss" in line else 0, abs=1e-6 if "val/loss" in line else 0
        )
    held_out = lines[0]
    rows = [held_out[f"val/loss/{name}"] for name in ("few", "many")]
    assert min(rows) < held_out["val/loss"] < max(rows)
    assert {"loss/few", "loss/many"} <= {name for line in lines for name in line}


def test_the_cache_survives_other_repeats_and_weights(
    toy: Toy, data: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = data
    assert train(config(toy, "first", data, cache=True), tmp_path / "one") == 0
    assert "encoding 52 images in 2 variations each" in capsys.readouterr().out
    changed = [{**few, "repeats": "balance", "name": "x"}, {**many, "weight": 3.0, "repeats": 2}]
    assert train(config(toy, "second", changed, cache=True), tmp_path / "two") == 0
    output = capsys.readouterr().out
    assert "encoding" not in output
    assert "source x: 12 of 12 images, 80 samples an epoch, weight 1\n" in output
    assert "source many: 40 of 40 images, 80 samples an epoch, weight 3\n" in output
    assert train(config(toy, "third", [few, {**many, "mirror": 0.25}], cache=True), tmp_path / "three") == 0
    assert "encoding 52 images" in capsys.readouterr().out

    (folder,) = {file.parent for file in (tmp_path / "cache").rglob("pictures.arrow")
                 if "mirror': 0.5" in str(json.loads(file.with_suffix(".json").read_text()))}  # fmt: skip
    gone = json.loads(json.dumps(data).replace(str(toy.root), str(tmp_path / "gone")))  # as on another machine
    assert train(config(toy, "gone", gone, cache_path=str(folder)), tmp_path / "without") == 0
    assert "training from the cache" in capsys.readouterr().out
    assert_equal_checkpoints(tmp_path / "one" / "iter_6.pth", tmp_path / "without" / "iter_6.pth")
    few_only = config(toy, "mismatch", gone[:1], cache_path=str(folder))
    assert train(few_only, tmp_path / "mismatch") == 2


def test_the_boundary_of_two_sources_is_in_the_fingerprint(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The same images and captions in the same order, but another one of them is mirrored."""
    for name in ("a", "b"):
        photos.write_photo_folder(tmp_path / name, 4, 32, "txt")
    data = [{"path": str(tmp_path / "a"), "mirror": 1.0}, {"path": str(tmp_path / "b")}]
    path = config(toy, "moved", data, cache=True, cache_path=str(tmp_path / "cache"))
    assert train(path, tmp_path / "one") == 0
    last = sorted((tmp_path / "a").glob("*.[jp]*"))[-1]
    for file in (last, last.with_suffix(".txt")):
        shutil.move(file, tmp_path / "b" / f" {file.name}")  # the first there
    capsys.readouterr()
    assert train(path, tmp_path / "two") == 0
    assert "changed since it was built: sources; encoding 8 images" in capsys.readouterr().out


def test_a_list_of_one_trains_as_the_path(toy: Toy, tmp_path: Path) -> None:
    for name, data in (("path", str(toy.data)), ("list", [str(toy.data)])):
        assert train(config(toy, name, data, flip=0.5), tmp_path / name) == 0
    assert_equal_checkpoints(tmp_path / "path" / "iter_6.pth", tmp_path / "list" / "iter_6.pth")
    assert results(tmp_path / "path") == results(tmp_path / "list")


def test_several_paths_on_the_command_line(
    toy: Toy, data: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    few, many = (item["path"] for item in data)
    path = toy.config("flags", default_hooks={}, prompts=1)
    for arguments in ([path, "--data", few, many], ["--data", few, many, path]):
        assert main(["train", *arguments, "--work-dir", str(tmp_path / "run"), "--overwrite"]) == 0
        known = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
        assert [(row["name"], row["path"], row["samples"]) for row in known["sources"]] == [
            ("few", few, 12), ("many", many, 40),
        ]  # fmt: skip
        assert known["images"] == 52
    capsys.readouterr()
    dead = str(tmp_path / "dead")
    os.mkdir(dead)
    assert main(["train", path, "--data", few, dead, "--work-dir", str(tmp_path / "run"), "--overwrite"]) == 2
    assert f"data[1] ('{dead}'): no images in {dead}" in capsys.readouterr().err
    assert main(["train", "--data", few, "--work-dir", str(tmp_path / "run")]) == 2
    assert "the following arguments are required: config" in capsys.readouterr().err
    assert main(["train", path, "--data", few, str(tmp_path / "run" / "previews"), "--work-dir", str(tmp_path / "run"),
                 "--overwrite", "--cfg-options", "captions_from_file_names=True"]) == 2  # fmt: skip
    assert "which would be deleted" in capsys.readouterr().err


def test_two_sources_to_generate(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prior preservation for two subjects, as items of `data`."""
    options = {"generation": {"num_inference_steps": 1}, "weight": 0.5}
    classes = [
        {"path": str(tmp_path / name), "caption": f"a {name}", "generate": count, **options}
        for name, count in (("cat", 2), ("dog", 3))
    ]
    path = config(toy, "two_classes", [str(toy.data), *classes], max_iters=1, aspect="keep")
    assert train(path, tmp_path / "run") == 0
    assert {name: len(list((tmp_path / name).glob("*.png"))) for name in ("cat", "dog")} == {"cat": 2, "dog": 3}
    assert "lacks 3 class images: generating 'a dog' before training" in capsys.readouterr().out


def test_a_vq_model_logs_each_source(toy: Toy, data: list[dict[str, Any]], tmp_path: Path) -> None:
    path = Path(toy.vq_config("vq_sources", max_iters=2, log_every=2))
    path.write_text(path.read_text().replace(repr(str(toy.data)), repr([item["path"] for item in data])))
    assert train(str(path), tmp_path) == 0
    last = runs.metrics(tmp_path)[-1]
    assert min(last["loss/few"], last["loss/many"]) <= last["loss"] <= max(last["loss/few"], last["loss/many"])


def _train_on_rank(toy: Toy, data: list[dict[str, Any]], out: Path) -> None:
    """Rank 1 has the last two samples of each step, in the first of which there is none of the few."""
    run = runs.build(config(toy, f"rank{distributed.rank()}", data, **TWO_STEPS), out)
    run.train()
    if distributed.rank() == 1:
        stream = run.train_loop.stream
        assert {stream.source_of(stream.locate(position)[1]) for position in (2, 3)} == {1}


TWO_STEPS: dict[str, Any] = {"max_iters": 2, "log_every": 1, "validation_every": 2, "aspect": "keep", "seed": 3}


@pytest.mark.soak
def test_two_ranks_write_the_same_rows(toy: Toy, data: list[dict[str, Any]], tmp_path: Path) -> None:
    runs.on_ranks(2, _train_on_rank, toy, data, tmp_path / "two")
    assert train(config(toy, "alone", data, **TWO_STEPS), tmp_path / "one") == 0
    for line, other in zip(results(tmp_path / "one"), results(tmp_path / "two"), strict=True):
        assert line.keys() == other.keys()
        losses = [name for name in line if "loss" in name]
        assert [line[name] for name in losses] == pytest.approx([other[name] for name in losses], rel=1e-5)
