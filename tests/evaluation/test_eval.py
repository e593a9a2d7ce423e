"""`diffengine eval`: one table for every source, setting and group; killed and started again, it goes on."""

import json
import math
import os
from pathlib import Path

import pytest
from PIL import Image

import diffengine
from diffengine.api import eval_data
from diffengine.cli import main
from diffengine.engine.run import Run
from diffengine.evaluation import EvalData
from diffengine.models.amused.sampler import AmusedSampler
from tests.engine.runs import Toy
from tests.support import photos

STEPS = {"max_iters": 2, "checkpoint_every": 1, "batch_size": 2}


@pytest.fixture(scope="module")
def run(toy: Toy) -> Run:
    return diffengine.train(toy.config("eval"), work_dir=toy.root / "eval-run", **STEPS)


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that were generated from."""
    found: list[str] = []
    tokens = AmusedSampler.tokens

    def record(self, requests, *arguments):
        found.extend(request.prompt for request in requests)
        return tokens(self, requests, *arguments)

    monkeypatch.setattr(AmusedSampler, "tokens", record)
    return found


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "eval.json").read_text())["rows"]


def test_a_run_on_its_own_data(run: Run, generated: list[str], capsys: pytest.CaptureFixture) -> None:
    arguments = [str(run.work_dir), "--guidance", "1", "3", "--steps", "1", "2", "--order", "confidence", "halton"]
    assert main(["eval", *arguments]) == 0
    folder = run.work_dir / "eval"
    table = rows(folder)
    assert len(table) == 8
    assert len({(row["guidance_scale"], row["num_inference_steps"], row["order"]) for row in table}) == 8
    assert len(generated) == 8 * 10
    assert all(row["images"] == 10 and 0 <= row["retrieval@1"] <= row["retrieval@5"] <= 1 for row in table)
    printed = capsys.readouterr().out
    assert (folder / "eval.md").read_text() in printed
    assert "chance 0.1000" in printed
    assert "VQ ceiling of" in printed
    assert "no CLIP score" in printed
    assert len(list(folder.glob("images/*/*.png"))) == 8 * 10 + 10
    with Image.open(folder / "eval.png") as grid:
        assert grid.width > 10 * 128
    generated.clear()
    assert main(["eval", *arguments]) == 0  # nothing is left to do
    assert generated == []
    assert rows(folder) == table
    next(iter(sorted(folder.glob("images/*steps*/000003.png")))).unlink()
    assert main(["eval", *arguments]) == 0
    assert len(generated) == 1
    without_times = [{**row, "seconds_per_image": 0} for row in table]
    assert [{**row, "seconds_per_image": 0} for row in rows(folder)] == without_times


def test_what_is_damaged_is_made_again(toy: Toy, tmp_path: Path, generated: list[str]) -> None:
    arguments = ["eval", str(toy.model), "--data", str(toy.data), "--max-images", "2", "--steps", "1"]
    arguments += ["-o", str(tmp_path / "out")]
    assert main(arguments) == 0
    table = rows(tmp_path / "out")
    first, second = sorted(tmp_path.glob("out/images/*steps*/*.png"))
    (losses,) = tmp_path.glob("out/*-losses.json")
    for file in (first, *tmp_path.glob("out/images/*/settings.json")):
        file.unlink()
        os.mkfifo(file)
    second.write_bytes(b"x")
    losses.write_text("[")
    generated.clear()
    assert main(arguments) == 0
    assert len(generated) == 2
    assert [{**row, "seconds_per_image": 0} for row in rows(tmp_path / "out")] == [
        {**row, "seconds_per_image": 0} for row in table
    ]


def test_the_losses_of_a_run_are_those_that_it_recorded(toy: Toy, tmp_path: Path) -> None:
    """Of its checkpoint, and of the pipeline that is exported; as many trained images are compared as are held out."""
    photos.write_photo_folder(tmp_path / "photos", 40, 40)
    options = {**STEPS, "data": str(tmp_path / "photos"), "validation_every": 2, "learning_rate": 1e-2}
    run = diffengine.train(toy.config("eval"), work_dir=tmp_path / "run", **options)
    diffengine.convert(run.checkpoints[-1], tmp_path / "pipeline", pipeline=True)
    recorded = [line for line in run.metrics if "val/loss" in line][-1]
    sources, out = [str(run.work_dir), str(tmp_path / "pipeline")], tmp_path / "out"
    arguments = ["eval", *sources, "--data", str(run.work_dir / "config.py"), "--steps", "1", "--max-images", "2"]
    assert main([*arguments, "-o", str(out)]) == 0
    losses = json.loads((out / "eval.json").read_text())["losses"]
    assert [row["source"] for row in losses] == sources
    for row in losses:
        found = {name: value for name, value in row.items() if name.startswith("val/")}
        assert found == pytest.approx({name: recorded[name] for name in found}, rel=1e-5, abs=1e-6)
        assert len(found) == 5 + 8
        assert row["ln V"] == pytest.approx(math.log(64))
    assert "val/caption gain" in (out / "eval.md").read_text()


def test_the_loss_on_a_folder_of_images(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are held out; computed once for the same weights and images."""
    folder = tmp_path / "photos"
    photos.write_photo_folder(folder, 3, 48)
    arguments = ["eval", str(run.work_dir), "--data", str(folder), "--steps", "1", "-o", str(tmp_path / "out")]
    assert main(arguments) == 0
    (row,) = json.loads((tmp_path / "out" / "eval.json").read_text())["losses"]
    assert "val/train_loss" not in row
    assert row["val/caption_gain"] == pytest.approx(row["val/loss_uncaptioned"] - row["val/loss"])
    monkeypatch.setattr(AmusedSampler, "masked_loss", None)
    assert main(arguments) == 0
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["losses"] == [row]


def test_an_image_is_the_one_that_sample_generates(run: Run, tmp_path: Path) -> None:
    assert main(["eval", str(run.work_dir), "--seed", "5", "--steps", "2", "--guidance", "2", "-o", str(tmp_path)]) == 0
    data = eval_data(str(run.work_dir / "config.py"), None, 100)
    (image,) = diffengine.sample(run.work_dir, [data.captions[3]], seed=8, guidance=2.0, steps=2)
    (file,) = tmp_path.glob("images/*steps*/000003.png")
    with Image.open(file) as stored:
        assert stored.convert("RGB").tobytes() == image.tobytes()


def test_changed_settings_generate_again(run: Run, tmp_path: Path, generated: list[str]) -> None:
    arguments = ["eval", str(run.checkpoints[0]), "--steps", "1", "--max-images", "4", "-o", str(tmp_path)]
    assert main([*arguments, "--seed", "1"]) == 0
    before = rows(tmp_path)
    assert len(generated) == before[0]["images"] == 4
    assert main([*arguments, "--seed", "2"]) == 0
    assert len(generated) == 8


def test_several_images_per_caption(run: Run, tmp_path: Path) -> None:
    arguments = [str(run.work_dir), "--n", "3", "--steps", "1", "--max-images", "2", "-o", str(tmp_path)]
    assert main(["eval", *arguments]) == 0
    assert rows(tmp_path)[0]["images"] == 6
    files = [file.read_bytes() for file in tmp_path.glob("images/*steps*/*.png")]
    assert len(files) == len(set(files)) == 6


def test_a_pipeline_of_anyones_on_a_folder_and_on_prompts(toy: Toy, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(toy.model), "--data", str(toy.data), "--steps", "1"]) == 0
    (row,) = rows(Path("eval/model"))
    assert (row["images"], row["guidance_scale"], row["group"]) == (10, 2.0, "all")
    Path("prompts.txt").write_text("a cat\n\na dog\n")
    assert main(["eval", str(toy.model), "--prompts", "prompts.txt", "--steps", "1", "-o", "out"]) == 0
    (row,) = rows(Path("out"))
    assert row["images"] == 2
    assert "retrieval@1" not in row
    capsys.readouterr()
    assert main(["eval", str(toy.model)]) == 2
    assert "is no run, so its data is not known; name it with --data, or give --prompts" in capsys.readouterr().err


def test_a_split_tells_trained_captions_from_unseen_ones() -> None:
    data = eval_data("amused_32_emoji", "all", 512)
    groups = data.indices()
    assert {name: len(indices) for name, indices in groups.items()} == {"trained": 384, "unseen": 128}
    assert sorted([*groups["trained"], *groups["unseen"]]) == list(range(512))
    own = set(eval_data("amused_32_emoji", None, 512).captions)
    assert {data.captions[index] for index in groups["trained"]} == own


def test_groups() -> None:
    assert EvalData(["a", "b"]).indices() == {"all": range(2)}
    assert EvalData(["a", "b"], groups={"trained": [], "unseen": [0, 1]}).indices() == {"unseen": [0, 1]}


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--guidance", "-1"], "--guidance got -1; expected a number from 0"),
        (["--steps", "0"], "--steps got 0; expected at least 1"),
        (["--steps", "4", "65"], "got 65 steps for 8x8 tokens; expected at most one step per token"),
        (["--n", "0"], "--n got 0; expected at least 1"),
        (["--max-images", "0"], "--max-images got 0; expected at least 1"),
        (["--data", "no/folder"], "there is no folder no/folder"),
        (["--prompts", "none.txt"], "'none.txt' cannot be read: No such file"),
    ],
)
def test_mistakes(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], answer: str) -> None:
    assert main(["eval", str(run.work_dir), "-o", str(tmp_path / "out"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert answer in line
    assert not list(tmp_path.glob("out/**/*.png"))
