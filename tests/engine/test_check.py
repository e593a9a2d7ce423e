"""What `check` says is what training then takes; and it leaves no trace."""

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
from tests.engine.runs import CPU, TEXT_TOO, Toy, on_ranks, train
from tests.engine.test_class_images import _config, _from_nothing
from tests.engine.test_micro import TORCH_SAYS
from tests.support.photos import all_captions

LORA = (
    "model.train=[]",
    "model.adapters={'transformer': {'type': 'peft.LoraConfig', 'r': 4, 'target_modules': ['to_q', 'to_k']}}",
)
AVERAGE = "custom_hooks=[{'type': 'diffengine.engine.hooks.EMAHook'}]"
CACHED = {"image_variations": 3, "max_iters": 30}


def report(path: str, work_dir: Path, *options: str) -> Report:
    return check(replace(make_job(path, *load_config(path, options), CPU), work_dir=work_dir))


def nbytes(module: nn.Module) -> int:
    """Of parameters and buffers."""
    return sum(item.nbytes for item in [*module.parameters(), *module.buffers()])


@pytest.fixture(scope="module")
def pipeline(toy: Toy) -> Any:
    return AmusedPipeline.from_pretrained(toy.model)


# ------------------------------------------------------------------------------------------------- memory


def test_memory_of_a_full_fine_tune(toy: Toy, tmp_path: Path, pipeline: Any) -> None:
    found = SimpleNamespace(**report(toy.config("whole", cache=False), tmp_path / "run").memory)
    weights = list(pipeline.transformer.parameters())
    assert found.trained == found.gradients == sum(4 * item.numel() for item in weights)
    assert found.optimizer == sum(2 * 4 * item.numel() + 4 for item in weights)  # AdamW: two moments, a step
    held = nbytes(pipeline.transformer) - found.trained + nbytes(pipeline.vqvae) + nbytes(pipeline.text_encoder)
    assert found.frozen == held
    assert found.average == 0


def test_memory_of_an_adapter_with_an_average(toy: Toy, tmp_path: Path, pipeline: Any) -> None:
    path = toy.config("adapter", cache=False)
    result = report(path, tmp_path / "run", *LORA, AVERAGE)
    adapted = [layer for name, layer in pipeline.transformer.named_modules() if name.endswith(("to_q", "to_k"))]
    count = sum(4 * (layer.in_features + layer.out_features) for layer in adapted)  # rank 4
    found = SimpleNamespace(**result.memory)
    assert result.parameters == count > 0
    assert found.trained == found.gradients == found.average == 4 * count
    assert found.optimizer == 2 * 4 * count + 4 * 2 * len(adapted)
    assert found.frozen == sum(map(nbytes, (pipeline.transformer, pipeline.vqvae, pipeline.text_encoder)))


# --------------------------------------------------------------------------------------------------- disk


@pytest.mark.parametrize("options", [("cache=False",), (AVERAGE,), LORA])
def test_the_size_of_a_checkpoint(toy: Toy, tmp_path: Path, options: tuple[str, ...]) -> None:
    path = toy.config("size", cache=False)
    said = report(path, tmp_path / "run", *options).checkpoint
    assert train(path, tmp_path / "run", "--cfg-options", *options) == 0
    assert said == pytest.approx((tmp_path / "run" / "iter_1.pth").stat().st_size, rel=0.01)


@pytest.mark.parametrize(
    ("every", "keep", "length", "expected"),
    [(None, 3, 100, 1), (1, 3, 50, 4), (1, None, 50, 50), (20, 3, 50, 3), (50, 1, 50, 1), (25, 1, 50, 2)],
)
def test_checkpoints_at_a_time(every: int | None, keep: int | None, length: int, expected: int) -> None:
    for clock in (Clock(None, length, 10, 4), Clock(length, None, 10, 4)):
        assert CheckpointHook(every, keep).kept_at_once(clock) == expected


@pytest.mark.parametrize("options", [(), (TEXT_TOO,)])
def test_the_size_of_the_cache(toy: Toy, tmp_path: Path, options: tuple[str, ...]) -> None:
    path = toy.config("cached", **CACHED)
    said = report(path, tmp_path / "run", *options).cache
    assert not said["exists"]
    assert not said["folder"].exists()
    assert said["seconds"] > 0
    runner = runs.build(path, tmp_path / "run", *options)
    tables = [file.stat().st_size for file in said["folder"].glob("*.arrow")]
    assert len(tables) == 2
    assert said["bytes"] == pytest.approx(sum(tables), rel=0.05)
    stream = runner.train_loop.stream
    assert said["rows"] == 3 * len(stream.dataset)
    assert said["captions"] == len({"", *all_captions(stream.dataset)})

    again = report(path, tmp_path / "run", *options).cache
    assert (again["exists"], again["seconds"], again["folder"]) == (True, 0.0, said["folder"])
    assert again["bytes"] == pytest.approx(sum(tables), rel=0.05)


def test_from_a_cache_nothing_is_encoded(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that are measured are those of training: tokens and embeddings come in their place."""
    prepared = []
    prepare = AmusedModel.prepare

    def watched(model: AmusedModel, batch: dict) -> dict:
        prepared.append((set(batch), set(prepare(model, batch))))
        return prepare(model, batch)

    monkeypatch.setattr(AmusedModel, "prepare", watched)
    report(toy.config("few", **CACHED), tmp_path / "run")
    assert len(prepared) == 2
    for given, made in prepared:
        assert "token_ids" in given
        assert "image" not in given
        assert {"hidden_states", "pooled_text_emb"} < made
        assert "text_ids" not in made


def test_a_cache_without_its_images(toy: Toy, tmp_path: Path) -> None:
    data = shutil.copytree(toy.data, tmp_path / "data")
    path = toy.config("moved", **{**CACHED, "data": str(data), "cache_path": str(tmp_path / "kept")})
    runs.build(path, tmp_path / "run")
    shutil.rmtree(data)
    before = tree(tmp_path / "kept")
    assert report(path, tmp_path / "run").cache["exists"]
    assert tree(tmp_path / "kept") == before


def test_why_there_is_no_cache(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "crop and flip" in report(toy.config("anew", image_variations=None), tmp_path / "run").cache
    assert report(toy.config("off", cache=False), tmp_path / "run").cache == "as configured"
    assert "at most once" in report(toy.config("short"), tmp_path / "run").cache
    assert cli.main(["check", toy.config("must", image_variations=None, cache=True)]) == 2
    assert "the cache cannot be used: crop and flip" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ no trace


def tree(*roots: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder, with size and time."""
    found = [path for root in roots for path in [root, *root.rglob("*")]]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def test_nothing_is_written_or_left(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Beside another process's run, with previews, a cache to build and class images to draw."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.chdir(tmp_path)
    work_dir = tmp_path / "run"
    assert train(toy.config("one"), work_dir) == 0
    path = _config(toy, "two", tmp_path / "class", 6, prompts=["a cat"], preview_every=1, **CACHED)
    capsys.readouterr()
    before = tree(tmp_path, toy.model, toy.data)
    steps = []
    step = StepOptimWrapper.step
    monkeypatch.setattr(StepOptimWrapper, "step", lambda self: steps.append(step(self)))
    with claimed(work_dir, None, overwrite=True):  # by the other process
        assert cli.main(["check", path, "--work-dir", str(work_dir)]) == 0
    after = tree(tmp_path, toy.model, toy.data)
    del before[str(scratch)], after[str(scratch)]  # its time: what was in it has gone
    assert before == after
    assert len(steps) == 2
    said = capsys.readouterr().out
    assert "20, 6 of them to be generated before training" in said
    assert "token cache" in said
    assert str(tmp_path / "cache") in said


def test_class_images_that_cannot_be_drawn(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = _config(toy, "cannot", tmp_path / "class", 2, model=_from_nothing(toy))
    assert cli.main(["check", path, "--work-dir", str(tmp_path / "run")]) == 2
    assert "lacks 2 class images, and the model, which is built from scratch" in capsys.readouterr().err
    assert not (tmp_path / "class").exists()


# -------------------------------------------------------------------------------------------- out of memory


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A memory that holds so many images, from so many forward passes on."""
    forward = AmusedModel.forward
    passes = []

    def set_to(most: int, since: int = 0) -> None:
        def limited(model: AmusedModel, batch: dict) -> Any:
            passes.append(len(batch["token_ids"]))
            if passes[-1] > most and len(passes) > since:
                raise torch.OutOfMemoryError(TORCH_SAYS)
            return forward(model, batch)

        monkeypatch.setattr(AmusedModel, "forward", limited)

    return set_to


def test_a_micro_batch_that_halves(toy: Toy, tmp_path: Path, limit: Any, capsys: pytest.CaptureFixture) -> None:
    limit(3)
    path = toy.config("halves", batch_size=8)
    assert cli.main(["check", path, "--work-dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "images at once       2\n" in said
    assert said.splitlines()[-1] == (
        "warning: memory ran out above 2 images at once, so steps will be split: set micro_batch_size=2"
    )


@pytest.mark.parametrize("since", [0, 1])  # from the first step on; in the one that is measured
def test_not_even_one_image(toy: Toy, tmp_path: Path, limit: Any, capsys: pytest.CaptureFixture, since: int) -> None:
    limit(0, since)
    path = toy.config("none", batch_size=1)
    assert cli.main(["check", path, "--work-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "even one image at a time does not fit into memory" in said


# ------------------------------------------------------------------------------------------------- the report


def test_the_report(toy: Toy, tmp_path: Path) -> None:
    """The parts of a step make up the step, and the steps the run."""
    found = report(toy.config("report", max_iters=50, num_workers=2), tmp_path / "run")
    seconds = found.seconds
    assert list(seconds) == ["data", "prepare", "forward_backward", "optimizer"]
    assert found.step == sum(seconds.values())
    assert min(seconds["prepare"], seconds["forward_backward"], seconds["optimizer"], found.first_step) > 0
    assert found.training == found.first_step + 49 * found.step
    assert (found.images, found.clock.max_iters, found.clock.max_epochs) == (10, 50, 20)
    assert found.peak > sum(found.memory.values())
    lines = table(found)
    said = {name.strip(): value for name, _, value in (line.partition("  ") for line in lines if line[:1] != " ")}
    assert said["steps"].strip() == "50 of 4 images: 20 epochs"
    assert said["a checkpoint"].strip() == format_bytes(found.checkpoint)
    assert {len(line) - len(line.split("  ", 1)[1].lstrip()) for line in lines if line[:1] not in ("", " ")} == {21}
    assert warnings(found) == []


def test_warnings(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    monkeypatch.setattr(checks, "available_memory", lambda: 10**6)
    found = report(toy.config("small", **CACHED, checkpoint_every=10), tmp_path / "run")
    assert found.checkpoints == 3
    needed = format_bytes(found.cache["bytes"] + 3 * found.checkpoint)
    memory, disk = warnings(found)
    assert memory.startswith(f"{format_bytes(found.peak)} of memory are more than the 1.0 MB")
    assert disk.startswith(f"the disk has 1.0 MB free, and {needed} are needed: keep fewer checkpoints")
    found.cache_free = 1000
    twice = format_bytes(2 * found.cache["bytes"])
    assert [line.partition(" ")[2].partition(":")[0] for line in warnings(found)[1:]] == [
        f"disk has 1.0 MB free, and {format_bytes(3 * found.checkpoint)} are needed",
        f"cache's disk has 1.0 kB free, and {twice} are needed",
    ]


def _on_one_of_two(path: str, root: Path) -> None:
    found = report(path, root / "run")
    assert found.images_at_once == 2
    assert isinstance(found.cache, dict)
    (root / f"rank-{distributed.rank()}").touch()


def test_several_processes(toy: Toy, tmp_path: Path) -> None:
    on_ranks(2, _on_one_of_two, toy.config("two_ranks", **CACHED), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["rank-0", "rank-1"]


def test_tensors_in_nested_state() -> None:
    one, two = torch.ones(1), torch.ones(2)
    assert [item.numel() for item in tensors_in({"a": [one, {"b": (two, 3)}], "c": None})] == [1, 2]
