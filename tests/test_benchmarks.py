"""Every benchmark runs and prints its table. Speed is not tested here."""

import argparse
import importlib
import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import breakdown, cache, common, counted, equal, memory, overhead, resume, sampling, soak, throughput
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
    """Run a benchmark, check the layout of its table, and return the rows by column."""

    def run(benchmark, *arguments: str) -> list[dict[str, str]]:
        benchmark.main(list(arguments))
        title, gap, *lines = capsys.readouterr().out.splitlines()
        assert f"torch {common.torch.__version__}" in title
        assert gap == ""
        assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
        columns, rule, *rows = [line[2:-2].split(" | ") for line in lines]
        assert rule == ["---"] * len(columns)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    return run


def numbers(row: dict[str, str], *columns: str) -> list[float]:
    """Cells as finite numbers: "1,234" is 1234, and "0.1 (0.09 to 0.2)" is 0.1."""
    values = [float(row[column].split()[0].replace(",", "")) for column in columns]
    assert all(map(math.isfinite, values))
    return values


def test_overhead(table) -> None:
    (row,) = table(overhead, "--pairs", "4", "--warm-up", "1", "--start", "1000000")
    assert row["start iteration"] == "1,000,000"
    bare, ours, *_ = numbers(
        row, "bare us", "ours us", "overhead us", "overhead, first quarter", "overhead, last quarter"
    )
    assert bare > 0
    assert ours > 0
    assert row["host syncs"] == "0"


def test_breakdown(table) -> None:
    online, cached = table(breakdown, "--resolution", "256", "--steps", "1", "--warm-up", "1", "--workers", "0")
    for row in (online, cached):
        assert list(row) == ["size", "px", "batch", "mode", *breakdown.PHASES, "total"]
        seconds = numbers(row, *breakdown.PHASES)
        assert sum(seconds) == pytest.approx(*numbers(row, "total"), rel=0.02)  # cells have three digits
    assert min(numbers(online, *breakdown.PHASES)) > 0
    assert [phase for phase in breakdown.PHASES if cached[phase] == "0"] == ["VQ", "text"]


def test_sampling(table) -> None:
    rows = table(sampling, "--size", "emoji", "--batch", "1", "3", "--guidance", "2", "--steps", "2", "--repeats", "2")
    assert [(row["batch"], row["mode"]) for row in rows] == [
        (batch, mode) for batch in ("1", "3") for mode in ("AmusedPipeline", "ours")
    ]
    for row in rows:
        assert [row[name] for name in ("size", "px", "guidance", "steps")] == ["emoji", "32", "2", "2"]
        assert min(numbers(row, "s/image", "speedup", "peak GB")) > 0
    for theirs, ours in zip(rows[::2], rows[1::2]):
        assert theirs["speedup"] == "1.00"
        ratio = numbers(theirs, "s/image")[0] / numbers(ours, "s/image")[0]
        assert numbers(ours, "speedup")[0] == pytest.approx(ratio, rel=0.02)  # cells have three digits


def test_the_emoji_pipeline_has_the_sizes_of_the_configs() -> None:
    pipeline = sampling.make_emoji_pipeline()
    sizes = pipeline.transformer.config
    assert (sizes.sample_size, sizes.hidden_size, sizes.codebook_size, pipeline.vae_scale_factor) == (8, 128, 256, 4)
    assert not any(module.training for module in (pipeline.vqvae, pipeline.text_encoder, pipeline.transformer))


def test_cache(table) -> None:
    (row,) = table(
        cache, "--resolution", "256", "--images", "2", "--variations", "2", "--batch", "2", "--batches",
        "3", "--workers", "0",
    )  # fmt: skip
    columns = ("rows/s built", "bytes/row", "bytes/caption", "samples/s read", "s to validate")
    _, variation, caption, *_ = numbers(row, *columns)
    assert variation >= 16 * 16  # one byte per token
    assert caption >= 4 * (77 * 24 + 20)  # hidden states and pooled, fp32


@pytest.mark.soak
def test_throughput_of_a_script(table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script only takes optimizer steps and ignores its arguments."""
    run_timed, runs = common.run_timed, []

    def record(*arguments, **options):
        runs.append(run_timed(*arguments, **options))
        return runs[0]

    monkeypatch.setattr(common, "run_timed", record)
    script = tmp_path / "script.py"
    script.write_text(STEPPER, encoding="utf-8")
    (row,) = table(
        throughput, str(script), "--modes", "reference", "--steps", "4", "--warm-up", "1", "--repeats", "1",
        "--batch", "2", "--resolution", "256",
    )  # fmt: skip
    assert [row[name] for name in ("size", "px", "batch", "precision", "mode", "speedup")] == [
        "tiny", "256", "2", "fp32", "reference", "1.00",
    ]  # fmt: skip
    (run,) = runs
    assert len(run.seconds) == 1 + 4 - 1  # one less than there are steps
    seconds, rate, memory = numbers(row, "s/step", "images/s", "peak GB")
    assert seconds == pytest.approx(statistics.median(run.seconds), rel=0.01)
    assert rate == pytest.approx(2 / seconds, rel=0.02)  # cells have three digits
    assert memory > 0
    assert row["matmul utilization"].endswith("%")


@pytest.mark.parametrize(
    ("ranks", "kills"),
    [
        ("1", "5"),
        pytest.param("1", "100", marks=pytest.mark.soak),
        pytest.param("2", "40", marks=pytest.mark.soak),
    ],
)
def test_stopped_runs_end_as_if_they_were_not(table, ranks: str, kills: str) -> None:
    rows = table(soak, "--ranks", ranks, "--kills", kills)
    assert [row["stopped by"] for row in rows] == list(soak.MOMENTS)
    assert {row["runs"] for row in rows} == {row["equal"] for row in rows} == {str(int(kills) // 5)}


@pytest.mark.soak
def test_a_program_that_exits_early_is_not_timed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(STEPPER, encoding="utf-8")
    assert common.run_timed([str(script), "2"], 3) == "the program exited before step 3"


def test_a_changed_checkpoint_equals_that_of_a_longer_run(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "model", tmp_path / "data", tmp_path)
    models.make_model_folder(toy.model, "toy")
    photos.write_photo_folder(toy.data, 10, 40)
    for count in (1, 3):
        path = toy.config(f"run{count}", max_iters=count, checkpoint_every=1, batch_size=resume.BATCH)
        assert train(path, tmp_path / str(count)) == 0
    changed = resume.change_checkpoint(checkpoint.read(tmp_path / "1" / "iter_1.pth"), 3)
    longer = checkpoint.read(tmp_path / "3" / "iter_3.pth")
    assert changed["counters"] == longer["counters"] == {"iter": 3, "epoch": 1}
    assert changed["param_scheduler"] == longer["param_scheduler"]
    for ours, expected in zip(changed["optimizer"]["state"].values(), longer["optimizer"]["state"].values()):
        assert ours["step"].equal(expected["step"])


def test_images_have_captions_and_distinct_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "DISTINCT_PHOTOS", 2)
    common.write_images(tmp_path, 5)
    table = (tmp_path / "metadata.csv").read_text(encoding="utf-8").splitlines()
    names = [line.split(",")[0].strip('"') for line in table[1:]]
    assert len(set(names)) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "metadata.csv"])


class Parsed(Exception):
    """Raised once the arguments have been parsed."""


@pytest.mark.parametrize(
    ("name", "arguments"),
    re.findall(r"python -m benchmarks\.(\w+)([^`#\n]*)", (common.ROOT / "benchmarks/README.md").read_text("utf-8")),
)
def test_commands_in_the_readme_parse(name: str, arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser: argparse.ArgumentParser, args: list[str]) -> None:
        parse(parser, args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    with pytest.raises(Parsed):
        importlib.import_module(f"benchmarks.{name}").main(arguments.split())


@pytest.mark.soak
def test_throughput_without_a_script(table) -> None:
    rows = table(
        throughput, "--steps", "2", "--warm-up", "1", "--repeats", "1", "--resolution", "256", "--workers",
        "0",
    )  # fmt: skip
    assert [row["mode"] for row in rows] == ["online", "cached"]
    for row in rows:
        assert all(value > 0 for value in numbers(row, "s/step", "images/s", "peak GB"))


@pytest.mark.soak
def test_resume(table) -> None:
    rows = table(resume, "--at", "10", "1000", "--repeats", "1")
    assert [row["resumed at"] for row in rows] == ["10", "1,000"]
    assert all(value > 0 for row in rows for value in numbers(row, "seconds to the first step"))
    assert rows[0]["difference to the first row"] == "+0.00"


@pytest.mark.soak
def test_memory(table) -> None:
    rows = table(memory, "--rows", "256_own_lora", "--first", "1", "--cached")
    assert [row["config"] for row in rows] == ["`amused_256_own_lora`"]
    assert all(value > 0 for value in numbers(rows[0], "GB", "published GB", "images/s"))


def test_storages_count_until_they_are_freed() -> None:
    with FakeTensorMode(), counted.Storages() as storages:
        a = torch.empty(1000)
        b = a + 1
        view = b[:10]
        assert (storages.live, storages.peak) == (8000, 8000)
        del a, b
        assert storages.live == 4000  # the view keeps the whole storage
        del view
        assert (storages.live, storages.peak) == (0, 8000)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["amused_256_own_lora", "amused_256_nouns_8bit"])
def test_counted_memory_includes_weights_gradients_and_optimizer_state(tmp_path: Path, name: str) -> None:
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
    state = memory_of(model, optimizer, {}, ())
    optimizer_type = resolved["optim_wrapper"]["optimizer"]["type"]
    assert counted.optimizer_bytes(model, optimizer_type) == pytest.approx(state["optimizer"], rel=0.01)
    assert sum(state.values()) < peaks[True] < peaks[False]


def test_mid_has_15_million_parameters(tmp_path: Path) -> None:
    common.make_model(tmp_path, "mid", 512)
    sizes = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert (sizes["hidden_size"], sizes["vocab_size"]) == (256, 8256)
    size = (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert 15.5e6 < size / 4 < 15.7e6  # fp32


# --------------------------------------------------------------------------------------- benchmarks.equal

CHECKPOINT, METRICS = "iter_2.pth", "metrics.jsonl"
WEIGHTS, PREVIEW = "transformer/diffusion_pytorch_model.safetensors", "previews/000002.png"


def write_work_dir(folder: Path, version: str = "1", seconds: float = 0.5) -> Path:
    """A small work dir with one file of each compared type. `version` and `seconds` must not matter."""
    weights = {"layer.weight": torch.linspace(-1, 1, 12).view(3, 4), "layer.bias": torch.ones(3, dtype=torch.bfloat16)}
    average = {"exp_avg": weights["layer.weight"] / 7, "step": torch.tensor(2.0)}
    state = {
        "folder": str(folder), "version": version, "model": weights, "counters": {"iter": 2, "epoch": 0},
        "optimizer": {"state": {0: average}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
    }  # fmt: skip
    lines = [
        {"iter": step, "loss": 2.5 / step, "images_per_second": 8 / seconds, "seconds_per_step": seconds,
         "data_wait": seconds / 10, "memory_gb": seconds}
        for step in (1, 2)
    ]  # fmt: skip
    for name in (WEIGHTS, PREVIEW):
        (folder / name).parent.mkdir(parents=True)
    torch.save(state, folder / CHECKPOINT)
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    save_file(weights, folder / WEIGHTS)
    photos.photos()["cat"].resize((16, 16)).save(folder / PREVIEW)
    return folder


@pytest.fixture
def work_dirs(tmp_path: Path) -> tuple[Path, Path]:
    return write_work_dir(tmp_path / "old"), write_work_dir(tmp_path / "new", version="2", seconds=0.75)


def flip_last_bit(tensor: torch.Tensor) -> None:
    """Flip the lowest bit of the last value, in place."""
    bits = tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16).flatten()
    bits[-1] ^= 1


def change_checkpoint(file: Path, *keys: str | int) -> None:
    state = torch.load(file, weights_only=True)
    tensor = state
    for key in keys:
        tensor = tensor[key]
    flip_last_bit(tensor)
    torch.save(state, file)


def change_metrics(file: Path) -> None:
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines[1]["loss"] = math.nextafter(lines[1]["loss"], 2)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def change_weights(file: Path) -> None:
    weights = load_file(file)
    flip_last_bit(weights["layer.bias"])
    save_file(weights, file)


def change_preview(file: Path) -> None:
    image = Image.open(file).convert("RGB")
    red, green, blue = image.getpixel((3, 5))
    image.putpixel((3, 5), (red, green, blue ^ 1))
    image.save(file)


def test_work_dirs_that_differ_only_in_times_are_equal(work_dirs: tuple[Path, Path]) -> None:
    old, new = work_dirs
    assert (old / METRICS).read_bytes() != (new / METRICS).read_bytes()
    assert (old / CHECKPOINT).read_bytes() != (new / CHECKPOINT).read_bytes()
    assert equal.compare(old, new) == (4, [])


@pytest.mark.parametrize(
    ("name", "change", "difference"),
    [
        (CHECKPOINT, lambda file: change_checkpoint(file, "model", "layer.weight"), f"{CHECKPOINT}.model.layer.weight"),
        (CHECKPOINT, lambda file: change_checkpoint(file, "model", "layer.bias"), f"{CHECKPOINT}.model.layer.bias"),
        (
            CHECKPOINT,
            lambda file: change_checkpoint(file, "optimizer", "state", 0, "exp_avg"),
            f"{CHECKPOINT}.optimizer.state.0.exp_avg",
        ),
        (METRICS, change_metrics, METRICS),
        (WEIGHTS, change_weights, f"{WEIGHTS}.layer.bias"),
        (PREVIEW, change_preview, PREVIEW),
    ],
)
def test_one_changed_bit_is_found(work_dirs: tuple[Path, Path], name: str, change, difference: str) -> None:
    old, new = work_dirs
    change(new / name)
    assert equal.compare(old, new) == (4, [difference])


@pytest.mark.parametrize("name", [CHECKPOINT, METRICS, WEIGHTS, PREVIEW])
def test_a_missing_file_is_found(work_dirs: tuple[Path, Path], name: str) -> None:
    old, new = work_dirs
    (new / name).unlink()
    assert equal.compare(old, new) == (4, [f"{name} is missing"])


def test_all_differences_are_listed_in_the_order_of_the_files(work_dirs: tuple[Path, Path]) -> None:
    old, new = work_dirs
    change_preview(new / PREVIEW)
    change_metrics(new / METRICS)
    (new / CHECKPOINT).unlink()
    assert equal.compare(old, new) == (4, [f"{CHECKPOINT} is missing", METRICS, PREVIEW])


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"a": {"b": torch.ones(2)}}, {"a": {"b": torch.ones(2)}}, []),
        ({"a": {"b": torch.ones(2)}}, {"a": {"b": torch.zeros(2)}}, ["x.a.b"]),
        ({"a": torch.ones(2)}, {"a": torch.ones(3)}, ["x.a"]),
        ({"a": torch.ones(2)}, {"a": torch.ones(2, dtype=torch.float64)}, ["x.a"]),
        ({"a": torch.ones(2)}, {"a": [1.0, 1.0]}, ["x.a"]),
        ({"a": 1, "b": 2}, {"a": 1}, ["x.b"]),
        ({"a": 1}, {"a": 1, "b": 2}, ["x.b"]),
        ({"a": [1, 2], "b": "c"}, {"a": [1, 3], "b": "d"}, ["x.a", "x.b"]),
    ],
    ids=["equal", "value", "shape", "dtype", "type", "missing key", "extra key", "plain values"],
)
def test_differences_of_nested_values(one: dict, other: dict, expected: list[str]) -> None:
    assert equal.differences(one, other, "x") == expected
