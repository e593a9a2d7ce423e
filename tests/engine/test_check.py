"""`check` predicts what training needs, and writes nothing."""

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AmusedPipeline
from torch import nn

from diffengine import cli, distributed
from diffengine.commands.check import table, warnings
from diffengine.engine import check as checks
from diffengine.engine.build import load_config, make_job
from diffengine.engine.check import Report, check
from diffengine.engine.clock import Clock
from diffengine.engine.hooks import CheckpointHook
from diffengine.engine.memory import tensors_in
from diffengine.engine.optim import StepOptimWrapper
from diffengine.engine.workdir import claimed
from diffengine.models.amused import AmusedModel
from diffengine.text import format_bytes
from tests.engine import runs
from tests.engine.runs import CPU, WITH_TEXT_ENCODER, Toy, on_ranks, train
from tests.engine.test_class_images import class_config, scratch_model
from tests.engine.test_micro import OOM_MESSAGE
from tests.support.photos import all_captions, write_photo_folder

LORA = (
    "model.train=[]",
    "model.adapters={'transformer': {'type': 'peft.LoraConfig', 'r': 4, 'target_modules': ['to_q', 'to_k']}}",
)
AVERAGE = "custom_hooks=[{'type': 'diffengine.engine.hooks.EMAHook'}]"
CACHED = {"image_variations": 3, "max_iters": 30}


def run_check(path: str, work_dir: Path, *options: str) -> Report:
    return check(replace(make_job(path, *load_config(path, options), CPU), work_dir=work_dir))


def nbytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(item.nbytes for item in [*module.parameters(), *module.buffers()])


@pytest.fixture(scope="module")
def pipeline(toy: Toy) -> Any:
    return AmusedPipeline.from_pretrained(toy.model)


# ------------------------------------------------------------------------------------------------- memory


def test_memory_of_a_full_fine_tune(toy: Toy, tmp_path: Path, pipeline: Any) -> None:
    memory = SimpleNamespace(**run_check(toy.config("whole", cache=False), tmp_path / "run").memory)
    weights = list(pipeline.transformer.parameters())
    assert memory.trained == memory.gradients == sum(4 * item.numel() for item in weights)
    assert memory.optimizer == sum(2 * 4 * item.numel() + 4 for item in weights)  # AdamW: two moments, a step count
    buffers = nbytes(pipeline.transformer) - memory.trained
    assert memory.frozen == buffers + nbytes(pipeline.vqvae) + nbytes(pipeline.text_encoder)
    assert memory.average == 0


def test_memory_of_an_adapter_with_an_average(toy: Toy, tmp_path: Path, pipeline: Any) -> None:
    path = toy.config("adapter", cache=False)
    result = run_check(path, tmp_path / "run", *LORA, AVERAGE)
    adapted = [layer for name, layer in pipeline.transformer.named_modules() if name.endswith(("to_q", "to_k"))]
    count = sum(4 * (layer.in_features + layer.out_features) for layer in adapted)  # rank 4
    memory = SimpleNamespace(**result.memory)
    assert result.parameters == count > 0
    assert memory.trained == memory.gradients == memory.average == 4 * count
    assert memory.optimizer == 2 * 4 * count + 4 * 2 * len(adapted)
    assert memory.frozen == sum(map(nbytes, (pipeline.transformer, pipeline.vqvae, pipeline.text_encoder)))


# --------------------------------------------------------------------------------------------------- disk


@pytest.mark.parametrize("options", [("cache=False",), (AVERAGE,), LORA])
def test_the_size_of_a_checkpoint(toy: Toy, tmp_path: Path, options: tuple[str, ...]) -> None:
    path = toy.config("size", cache=False)
    predicted = run_check(path, tmp_path / "run", *options).checkpoint
    assert train(path, tmp_path / "run", "--cfg-options", *options) == 0
    assert predicted == pytest.approx((tmp_path / "run" / "iter_1.pth").stat().st_size, rel=0.01)


@pytest.mark.parametrize(
    ("every", "keep", "length", "expected"),
    [(None, 3, 100, 1), (1, 3, 50, 4), (1, None, 50, 50), (20, 3, 50, 3), (50, 1, 50, 1), (25, 1, 50, 2)],
)
def test_checkpoints_kept_at_once(every: int | None, keep: int | None, length: int, expected: int) -> None:
    for clock in (Clock(None, length, 10, 4), Clock(length, None, 10, 4)):
        assert CheckpointHook(every, keep).kept_at_once(clock, validates=False) == expected
        assert CheckpointHook(every, keep).kept_at_once(clock, validates=True) == expected + 1
        assert CheckpointHook(every, keep, best_by=None).kept_at_once(clock, validates=True) == expected


def test_held_out_images_are_not_trained(toy: Toy, tmp_path: Path) -> None:
    write_photo_folder(tmp_path / "photos", 40, 40)
    options = {"data": str(tmp_path / "photos"), "max_epochs": 2, "validation_every": 1, "checkpoint_every": 1}
    path = toy.config("epochs", **options)
    report = run_check(path, tmp_path / "run")
    assert (report.images, report.clock.num_samples, report.clock.max_iters) == (40, 32, 16)
    assert report.checkpoints == 3  # one per epoch, and the best


@pytest.mark.parametrize("options", [(), (WITH_TEXT_ENCODER,)])
def test_the_size_of_the_cache(toy: Toy, tmp_path: Path, options: tuple[str, ...]) -> None:
    path = toy.config("cached", **CACHED)
    cache = run_check(path, tmp_path / "run", *options).cache
    assert not cache["exists"]
    assert not cache["folder"].exists()
    assert cache["seconds"] > 0
    runner = runs.build(path, tmp_path / "run", *options)
    sizes = [file.stat().st_size for file in cache["folder"].glob("*.arrow")]
    assert len(sizes) == 2
    assert cache["bytes"] == pytest.approx(sum(sizes), rel=0.05)
    stream = runner.train_loop.stream
    assert cache["rows"] == 3 * len(stream.dataset)
    assert cache["captions"] == len({"", *all_captions(stream.dataset)})

    again = run_check(path, tmp_path / "run", *options).cache
    assert (again["exists"], again["seconds"], again["folder"]) == (True, 0.0, cache["folder"])
    assert again["bytes"] == pytest.approx(sum(sizes), rel=0.05)


def test_measured_steps_use_the_cache_too(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in training, a batch has tokens instead of images, and embeddings instead of caption ids."""
    calls = []
    prepare = AmusedModel.prepare

    def recorded(model: AmusedModel, batch: dict) -> dict:
        calls.append((set(batch), set(prepare(model, batch))))
        return prepare(model, batch)

    monkeypatch.setattr(AmusedModel, "prepare", recorded)
    run_check(toy.config("few", **CACHED), tmp_path / "run")
    assert len(calls) == 2
    for batch, prepared in calls:
        assert "token_ids" in batch
        assert "image" not in batch
        assert {"hidden_states", "pooled_text_emb"} < prepared
        assert "text_ids" not in prepared


def test_a_cache_without_its_images(toy: Toy, tmp_path: Path) -> None:
    data = shutil.copytree(toy.data, tmp_path / "data")
    path = toy.config("moved", **{**CACHED, "data": str(data), "cache_path": str(tmp_path / "kept")})
    runs.build(path, tmp_path / "run")
    shutil.rmtree(data)
    before = snapshot(tmp_path / "kept")
    assert run_check(path, tmp_path / "run").cache["exists"]
    assert snapshot(tmp_path / "kept") == before


def test_why_there_is_no_cache(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "crop and flip" in run_check(toy.config("random", image_variations=None), tmp_path / "run").cache
    assert run_check(toy.config("off", cache=False), tmp_path / "run").cache == "as configured"
    assert "at most once" in run_check(toy.config("short"), tmp_path / "run").cache
    assert cli.main(["check", toy.config("must", image_variations=None, cache=True)]) == 2
    assert "the cache cannot be used: crop and flip" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- nothing is written


def snapshot(*roots: Path) -> dict[str, tuple[int, int]]:
    """The size and modification time of every file and folder."""
    paths = [path for root in roots for path in [root, *root.rglob("*")]]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def test_check_leaves_no_file_behind(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In the work dir of another process, with previews, a cache to build and class images to generate."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.chdir(tmp_path)
    work_dir = tmp_path / "run"
    assert train(toy.config("one"), work_dir) == 0
    path = class_config(toy, "two", tmp_path / "class", 6, prompts=["a cat"], preview_every=1, **CACHED)
    capsys.readouterr()
    before = snapshot(tmp_path, toy.model, toy.data)
    steps = []
    step = StepOptimWrapper.step
    monkeypatch.setattr(StepOptimWrapper, "step", lambda self: steps.append(self) or step(self))
    with claimed(work_dir, None, overwrite=True):  # as the other process does
        assert cli.main(["check", path, "--work-dir", str(work_dir)]) == 0
    after = snapshot(tmp_path, toy.model, toy.data)
    del before[str(scratch)], after[str(scratch)]  # its modification time differs: temporary files came and went
    assert before == after
    assert len(steps) == 2
    output = capsys.readouterr().out
    assert "16, 6 of them to be generated before training" in output
    assert "token cache" in output
    assert str(tmp_path / "cache") in output


def test_class_images_that_cannot_be_generated(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = class_config(toy, "cannot", tmp_path / "class", 2, model=scratch_model(toy))
    assert cli.main(["check", path, "--work-dir", str(tmp_path / "run")]) == 2
    assert "lacks 2 class images, and the model, which is built from scratch" in capsys.readouterr().err
    assert not (tmp_path / "class").exists()


# -------------------------------------------------------------------------------------------- out of memory


@pytest.fixture
def limit_memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`limit_memory(most, since)`: after `since` forward passes, one of more than `most` images fails."""
    forward = AmusedModel.forward
    passes = []

    def limit(most: int, since: int = 0) -> None:
        def limited(model: AmusedModel, batch: dict) -> Any:
            passes.append(len(batch["token_ids"]))
            if passes[-1] > most and len(passes) > since:
                raise torch.OutOfMemoryError(OOM_MESSAGE)
            return forward(model, batch)

        monkeypatch.setattr(AmusedModel, "forward", limited)

    return limit


def test_the_micro_batch_is_halved(toy: Toy, tmp_path: Path, limit_memory: Any, capsys: pytest.CaptureFixture) -> None:
    limit_memory(3)
    path = toy.config("halves", batch_size=8)
    assert cli.main(["check", path, "--work-dir", str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out
    assert "images at once       2\n" in output
    assert output.splitlines()[-1] == (
        "warning: memory ran out above 2 images at once, so steps are split: set --cfg-options micro_batch_size=2"
    )


@pytest.mark.parametrize("since", [0, 1])  # at the first step; at the measured step
def test_one_image_does_not_fit(
    toy: Toy, tmp_path: Path, limit_memory: Any, capsys: pytest.CaptureFixture, since: int
) -> None:
    limit_memory(0, since)
    path = toy.config("none", batch_size=1)
    assert cli.main(["check", path, "--work-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "even one image at a time does not fit into memory" in error


# ------------------------------------------------------------------------------------------------- the report


def test_the_report(toy: Toy, tmp_path: Path) -> None:
    """The phases add up to a step, and the steps to the run."""
    report = run_check(toy.config("report", max_iters=50, num_workers=2), tmp_path / "run")
    seconds = report.seconds
    assert list(seconds) == ["data", "prepare", "forward_backward", "optimizer"]
    assert report.step == sum(seconds.values())
    assert min(seconds["prepare"], seconds["forward_backward"], seconds["optimizer"], report.first_step) > 0
    assert report.training == report.first_step + 49 * report.step
    assert (report.images, report.clock.max_iters, report.clock.max_epochs) == (10, 50, 20)
    assert report.peak > sum(report.memory.values())
    lines = table(report)
    values = {name.strip(): value for name, _, value in (line.partition("  ") for line in lines if line[:1] != " ")}
    assert values["steps"].strip() == "50 of 4 images: 20 epochs"
    assert values["a checkpoint"].strip() == format_bytes(report.checkpoint)
    assert {len(line) - len(line.split("  ", 1)[1].lstrip()) for line in lines if line[:1] not in ("", " ")} == {21}
    assert warnings(report) == []


def test_warnings(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    monkeypatch.setattr(checks, "device_memory", lambda: 10**6)
    report = run_check(toy.config("small", **CACHED, checkpoint_every=10), tmp_path / "run")
    assert report.checkpoints == 3
    needed = format_bytes(report.cache["bytes"] + 3 * report.checkpoint)
    memory, disk = warnings(report)
    assert memory.startswith(f"{format_bytes(report.peak)} of memory are more than the 1.0 MB")
    assert disk.startswith(f"the disk has 1.0 MB free, and {needed} are needed: keep fewer checkpoints")
    report.cache_free = 1000
    twice = format_bytes(2 * report.cache["bytes"])
    assert [line.partition(" ")[2].partition(":")[0] for line in warnings(report)[1:]] == [
        f"disk has 1.0 MB free, and {format_bytes(3 * report.checkpoint)} are needed",
        f"cache's disk has 1.0 kB free, and {twice} are needed",
    ]


def _check_on_rank(path: str, root: Path) -> None:
    report = run_check(path, root / "run")
    assert report.images_at_once == 2
    assert isinstance(report.cache, dict)
    (root / f"rank-{distributed.rank()}").touch()


def test_several_processes(toy: Toy, tmp_path: Path) -> None:
    on_ranks(2, _check_on_rank, toy.config("two_ranks", **CACHED), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["rank-0", "rank-1"]


def test_tensors_in_nested_state() -> None:
    one, two = torch.ones(1), torch.ones(2)
    assert [item.numel() for item in tensors_in({"a": [one, {"b": (two, 3)}], "c": None})] == [1, 2]
