"""Every benchmark runs and prints the table it promises; how fast is not asked here."""

import argparse
import importlib
import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import breakdown, cache, common, counted, memory, overhead, resume, throughput
from diffengine.engine import checkpoint
from diffengine.engine.build import build_model, load_config
from diffengine.engine.memory import memory_of
from diffengine.engine.optim import build_optimizer, parameter_groups
from tests.engine.runs import Toy, train
from tests.support import models, photos

STEPPER = """
import sys, torch
weight = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([weight], lr=1.0)
for step in range(int(sys.argv[1]) if sys.argv[1:] and sys.argv[1].isdigit() else 1000):
    weight.sum().backward()
    optimizer.step()
"""


@pytest.fixture
def table(capsys: pytest.CaptureFixture[str]):
    """Run a benchmark and give its table's rows by column, having looked at their form."""

    def run(benchmark, *arguments: str) -> list[dict[str, str]]:
        benchmark.main(list(arguments))
        about, gap, *lines = capsys.readouterr().out.splitlines()
        assert f"torch {common.torch.__version__}" in about
        assert gap == ""
        assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
        columns, rule, *rows = [line[2:-2].split(" | ") for line in lines]
        assert rule == ["---"] * len(columns)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    return run


def numbers(row: dict[str, str], *columns: str) -> list[float]:
    """Cells as finite numbers: "1,234", or the first of "0.1 (0.09 to 0.2)"."""
    values = [float(row[column].split()[0].replace(",", "")) for column in columns]
    assert all(map(math.isfinite, values))
    return values


def test_overhead(table) -> None:
    (row,) = table(overhead, "--pairs", "4", "--warm-up", "1", "--start", "1000000")
    assert row["from iteration"] == "1,000,000"
    bare, ours, *_ = numbers(row, "bare us", "ours us", "over us", "first quarter", "last quarter")
    assert bare > 0
    assert ours > 0
    assert row["host waits"] == "0"


def test_breakdown(table) -> None:
    online, cached = table(breakdown, "--resolution", "256", "--steps", "1", "--warm-up", "1", "--workers", "0")
    for row in (online, cached):
        assert list(row) == ["size", "px", "batch", "way", *breakdown.PARTS, "all"]
        parts = numbers(row, *breakdown.PARTS)
        assert sum(parts) == pytest.approx(*numbers(row, "all"), rel=0.02)  # each to three digits
    assert min(numbers(online, *breakdown.PARTS)) > 0
    assert [part for part in breakdown.PARTS if cached[part] == "0"] == ["VQ", "text"]


def test_cache(table) -> None:
    (row,) = table(
        cache, "--resolution", "256", "--images", "2", "--variations", "2", "--batch", "2", "--batches",
        "3", "--workers", "0",
    )  # fmt: skip
    columns = ("rows/s built", "bytes/row", "bytes/caption", "samples/s read", "s at the next start")
    _, form, caption, *_ = numbers(row, *columns)
    assert form >= 16 * 16  # a byte a token
    assert caption >= 4 * (77 * 24 + 20)  # hidden states and pooled, fp32


def test_throughput_of_a_script(table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a program that takes steps and heeds no argument."""
    timed, runs = common.timed, []
    monkeypatch.setattr(common, "timed", lambda *given, **more: runs.append(timed(*given, **more)) or runs[0])
    script = tmp_path / "script.py"
    script.write_text(STEPPER, encoding="utf-8")
    (row,) = table(
        throughput, str(script), "--ways", "reference", "--steps", "4", "--warm-up", "1", "--repeats", "1",
        "--batch", "2", "--resolution", "256",
    )  # fmt: skip
    assert [row[name] for name in ("size", "px", "batch", "precision", "way", "times")] == [
        "tiny", "256", "2", "fp32", "reference", "1.00",
    ]  # fmt: skip
    (run,) = runs
    assert len(run.seconds) == 1 + 4 - 1  # between so many steps
    seconds, rate, memory = numbers(row, "s/step", "images/s", "peak GB")
    assert seconds == pytest.approx(statistics.median(run.seconds), rel=0.01)
    assert rate == pytest.approx(2 / seconds, rel=0.02)  # of three digits each
    assert memory > 0
    assert row["matrix rate"].endswith("%")


@pytest.mark.soak
def test_a_program_that_ends_early_is_not_timed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(STEPPER, encoding="utf-8")
    assert common.timed([str(script), "2"], 3) == "it ended before step 3"


def test_a_moved_checkpoint_is_that_of_a_longer_run(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "model", tmp_path / "data", tmp_path)
    models.make_model_folder(toy.model, "toy")
    photos.write_photo_folder(toy.data, 10, 40)
    for count in (1, 3):
        path = toy.config(f"run{count}", max_iters=count, checkpoint_every=1, batch_size=resume.BATCH)
        assert train(path, tmp_path / str(count)) == 0
    moved = resume.moved(checkpoint.read(tmp_path / "1" / "iter_1.pth"), 3)
    longer = checkpoint.read(tmp_path / "3" / "iter_3.pth")
    assert moved["counters"] == longer["counters"] == {"iter": 3, "epoch": 1}
    assert moved["param_scheduler"] == longer["param_scheduler"]
    for mine, theirs in zip(moved["optimizer"]["state"].values(), longer["optimizer"]["state"].values()):
        assert mine["step"].equal(theirs["step"])


def test_images_are_captioned_and_distinct_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "DISTINCT_PHOTOS", 2)
    common.write_images(tmp_path, 5)
    table = (tmp_path / "metadata.csv").read_text(encoding="utf-8").splitlines()
    names = [line.split(",")[0].strip('"') for line in table[1:]]
    assert len(set(names)) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "metadata.csv"])


class Parsed(Exception):
    """Arguments were taken."""


@pytest.mark.parametrize(
    ("name", "arguments"),
    re.findall(r"python -m benchmarks\.(\w+)([^`#\n]*)", (common.ROOT / "benchmarks/README.md").read_text("utf-8")),
)
def test_the_readmes_commands_are_taken(name: str, arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser: argparse.ArgumentParser, given: list[str]) -> None:
        parse(parser, given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    with pytest.raises(Parsed):
        importlib.import_module(f"benchmarks.{name}").main(arguments.split())


@pytest.mark.soak
def test_throughput_of_ours(table) -> None:
    rows = table(
        throughput, "--steps", "2", "--warm-up", "1", "--repeats", "1", "--resolution", "256", "--workers",
        "0",
    )  # fmt: skip
    assert [row["way"] for row in rows] == ["online", "cached"]
    for row in rows:
        assert all(value > 0 for value in numbers(row, "s/step", "images/s", "peak GB"))


@pytest.mark.soak
def test_resume(table) -> None:
    rows = table(resume, "--at", "10", "1000", "--repeats", "1")
    assert [row["from iteration"] for row in rows] == ["10", "1,000"]
    assert all(value > 0 for row in rows for value in numbers(row, "seconds to the first step"))
    assert rows[0]["more than the first row"] == "+0.00"


@pytest.mark.soak
def test_memory(table) -> None:
    rows = table(memory, "--rows", "256_own_lora", "--first", "1", "--cached")
    assert [row["config"] for row in rows] == ["`amused_256_own_lora`"]
    assert all(value > 0 for value in numbers(rows[0], "GB", "published GB", "images/s"))


def test_storages_count_while_they_live() -> None:
    with FakeTensorMode(), counted.Storages() as storages:
        a = torch.empty(1000)
        b = a + 1
        view = b[:10]
        assert (storages.live, storages.peak) == (8000, 8000)
        del a, b
        assert storages.live == 4000  # the view holds all of it
        del view
        assert (storages.live, storages.peak) == (0, 8000)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["amused_256_own_lora", "amused_256_nouns_8bit"])
def test_a_counted_step_holds_what_a_run_holds(tmp_path: Path, name: str) -> None:
    folder = models.make_model_folder(tmp_path, "toy")
    peaks = {}
    for checkpointing in (False, True):
        options = ["batch_size=4", f"gradient_checkpointing={checkpointing}"]
        _, resolved = load_config(name, options, {"pretrained": str(folder)})
        peaks[checkpointing] = counted.peak_of(resolved, 2)
    model = build_model(resolved, {}, seed=0)
    model.hold_frozen(torch.bfloat16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(resolved["optim_wrapper"]["optimizer"], parameter_groups(model))
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = memory_of(model, optimizer, {})
    kind = resolved["optim_wrapper"]["optimizer"]["type"]
    assert counted.state_bytes(model, kind) == pytest.approx(state["optimizer"], rel=0.01)
    assert sum(state.values()) < peaks[True] < peaks[False]


def test_mid_has_15_million_parameters(tmp_path: Path) -> None:
    common.make_model(tmp_path, "mid", 512)
    sizes = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert (sizes["hidden_size"], sizes["vocab_size"]) == (256, 8256)
    header = (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert 15.5e6 < header / 4 < 15.7e6  # fp32
