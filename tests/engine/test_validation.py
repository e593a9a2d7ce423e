"""Validation in a run: held-out images, metrics, the best checkpoint, early stopping, warnings, and old weights."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from diffengine.cli import main
from diffengine.engine import checkpoint
from diffengine.engine.hooks.validation import ValidationHook
from diffengine.errors import UserError
from tests.engine import runs
from tests.engine.runs import Toy, train
from tests.support import photos

KEYS = {"val/loss", "val/loss_uncaptioned", "val/caption_gain", "val/accuracy", "val/train_loss"} | {
    f"val/loss_t{number}" for number in range(8)
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    photos.write_photo_folder(folder, 40, 40)
    return folder


def config(toy: Toy, data: Path, name: str, **settings: Any) -> str:
    options = {"data": str(data), "max_iters": 8, "validation_every": 4, "learning_rate": 1e-3, **settings}
    return toy.config(name, **options)


def lines(work_dir: Path, prefix: str = "val/") -> list[dict[str, Any]]:
    """The values of each validation, with its step."""
    found = [line for line in runs.metrics(work_dir) if any(key.startswith(prefix) for key in line)]
    return [{key: value for key, value in line.items() if key not in ("time", "epoch")} for line in found]


def test_a_run_validates_before_at_intervals_and_at_the_end(toy: Toy, data: Path, tmp_path: Path) -> None:
    path = config(toy, data, "validates", max_iters=5, validation_every=2)
    assert train(path, tmp_path / "run") == 0
    found = lines(tmp_path / "run")
    assert [line["iter"] for line in found] == [0, 2, 4, 5]
    assert all(set(line) == {"iter", *KEYS} for line in found)
    for line in found:
        assert line["val/caption_gain"] == pytest.approx(line["val/loss_uncaptioned"] - line["val/loss"])
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "validation: 8 held-out and 8 trained images" in log
    assert "toy: 32 images" not in log
    assert ": 32 images, 5 steps" in log
    run = runs.build(path, tmp_path / "other", "max_iters=1")
    run.train()
    assert set(run.reference_losses) == {"ln 64", "unigram entropy"}
    assert 3 < run.reference_losses["unigram entropy"] < 5.5


def test_cached_and_uncached_runs_validate_equally(toy: Toy, data: Path, tmp_path: Path) -> None:
    found = []
    for cache in (True, False):
        folder = str(tmp_path / "cache") if cache else None
        path = config(toy, data, f"cache{cache}", max_iters=4, cache=cache, cache_path=folder)
        assert train(path, tmp_path / str(cache)) == 0
        found.append(lines(tmp_path / str(cache)))
    for one, other in zip(*found):
        assert one == pytest.approx(other, rel=1e-5)


def test_validation_changes_nothing_of_training(toy: Toy, tmp_path: Path) -> None:
    states = []
    for every in (0, 1):
        path = toy.config(f"every{every}", max_iters=3, validation_every=every, validation_share=0)
        assert train(path, tmp_path / str(every)) == 0
        states.append(checkpoint.read(tmp_path / str(every) / "iter_3.pth"))
    assert all(torch.equal(value, states[1]["model"][name]) for name, value in states[0]["model"].items())
    assert [set(line) for line in lines(tmp_path / "1")] == [{"iter", "val/train_loss"}] * 4  # of ten images
    assert lines(tmp_path / "0") == []


def test_early_stopping(toy: Toy, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With a learning rate of 0 the loss never falls."""
    path = config(toy, data, "stops", max_iters=60, validation_every=1, patience=2, learning_rate=0.0, log_every=60)
    assert train(path, tmp_path / "run") == 0
    assert [line["iter"] for line in lines(tmp_path / "run")] == [0, 1, 2]
    assert "stopping: no lower val/loss in 2 validations, since step 0" in capsys.readouterr().out
    assert checkpoint.newest(tmp_path / "run").name == "iter_2.pth"
    assert (tmp_path / "run" / "transformer").is_dir()


def test_the_best_checkpoint(toy: Toy, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = config(toy, data, "best", max_iters=4, validation_every=1, learning_rate=0.03)  # diverges after a while
    assert train(path, tmp_path / "run") == 0
    losses = {line["iter"]: line["val/loss"] for line in lines(tmp_path / "run")[1:]}
    step = min(losses, key=losses.__getitem__)
    assert checkpoint.read(tmp_path / "run" / "best.pth")["counters"]["iter"] == step
    assert step < 4
    assert checkpoint.newest(tmp_path / "run").name == "iter_4.pth"
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "run"), "--best"]) == 0
    assert f"best.pth is of step {step}\n" in capsys.readouterr().out
    assert main(["convert", path, str(tmp_path / "run" / "iter_4.pth"), str(tmp_path / "out"), "--best"]) == 2
    assert "--best is for a work dir" in capsys.readouterr().err


def test_the_best_checkpoint_is_written_before_that_of_its_step(toy: Toy, data: Path, tmp_path: Path) -> None:
    """Else a run that is killed in between would resume after the step, and never write it."""
    path = config(toy, data, "order", max_iters=2, validation_every=2, checkpoint_every=1)
    hook = {"type": "tests.engine.test_harm.Harm", "work": "link", "name": ".iter_2.pth.tmp"}
    assert train(path, tmp_path / "run", "--cfg-options", f"custom_hooks=[{hook}]") == 2
    assert checkpoint.newest(tmp_path / "run").name == "iter_1.pth"
    assert checkpoint.read(tmp_path / "run" / "best.pth")["counters"]["iter"] == 2


@pytest.mark.soak
def test_a_resumed_run_keeps_the_best(toy: Toy, data: Path, tmp_path: Path) -> None:
    path = config(toy, data, "resumes", max_iters=4, validation_every=1, checkpoint_every=2, keep_checkpoints=None)
    assert train(path, tmp_path / "whole") == 0
    assert train(path, tmp_path / "resumed") == 0
    (tmp_path / "resumed" / "iter_4.pth").unlink()
    assert train(path, tmp_path / "resumed", "--resume") == 0
    assert lines(tmp_path / "resumed") == lines(tmp_path / "whole")
    states = [checkpoint.read(tmp_path / name / "best.pth") for name in ("whole", "resumed")]
    assert states[0]["counters"] == states[1]["counters"]


def test_other_data(toy: Toy, data: Path, tmp_path: Path) -> None:
    path = config(toy, data, "other", max_iters=2, validation_every=2, validation_data=str(toy.data))
    assert train(path, tmp_path / "run") == 0
    assert [set(line) for line in lines(tmp_path / "run")] == [{"iter", *KEYS}] * 2
    assert ": 40 images" in (tmp_path / "run" / "log.txt").read_text()  # all are trained


def test_init_from_takes_the_weights_and_not_the_settings(toy: Toy, data: Path, tmp_path: Path, capsys) -> None:
    assert train(config(toy, data, "first", max_iters=3), tmp_path / "first") == 0
    weights = str(tmp_path / "first" / "iter_3.pth")
    path = config(toy, data, "second", max_iters=1, learning_rate=1e-9, validation_every=1)
    assert train(path, tmp_path / "second", "--init-from", weights) == 0
    last, first = lines(tmp_path / "first")[-1], lines(tmp_path / "second")[0]
    assert first == pytest.approx({**last, "iter": 0}, rel=1e-6)
    capsys.readouterr()
    assert train(path, tmp_path / "third", "--init-from", weights, "--resume") == 2
    assert "got --init-from and --resume" in capsys.readouterr().err
    assert train(path, tmp_path / "third", "--init-from", "none.pth") == 2
    assert train(path, tmp_path / "third", "--init-from", "") == 2  # as of a shell's variable that is not set
    assert "checkpoint 'none.pth' does not exist" in capsys.readouterr().err


def test_warnings(toy: Toy, data: Path, tmp_path: Path) -> None:
    run = runs.build(config(toy, data, "warns", max_iters=40), tmp_path / "run")
    hook = next(hook for hook in run.hooks if isinstance(hook, ValidationHook))
    written = [
        {"iter": 0, "val/loss": 4.0, "val/train_loss": 4.0, "val/caption_gain": 0.0},
        {"iter": 10, "val/loss": 3.0, "val/train_loss": 3.0, "val/caption_gain": 0.001},
        {"iter": 20, "val/loss": 3.1, "val/train_loss": 2.5, "val/caption_gain": 0.002},
        {"iter": 30, "val/loss": 3.2, "val/train_loss": 2.0, "val/caption_gain": 0.002},
    ]
    for count in range(1, 5):
        run.clock.done = written[count - 1]["iter"]
        (run.work_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written[:count]))
        hook._judge(run)
    assert [(warning["step"], warning["text"].partition(":")[0]) for warning in run.warnings] == [
        (10, "captions are ignored"), (30, "over-fitting since step 10"),
    ]  # fmt: skip


def test_a_held_out_loss_that_never_fell_below_chance_is_no_over_fitting(toy: Toy, data: Path, tmp_path: Path) -> None:
    run = runs.build(config(toy, data, "chance", max_iters=400), tmp_path / "run")
    hook = next(hook for hook in run.hooks if isinstance(hook, ValidationHook))
    chance = math.log(64)
    written = [
        {"iter": step, "val/loss": chance + step / 100, "val/train_loss": chance - step / 100, "val/caption_gain": 1.0}
        for step in range(0, 90, 10)
    ]
    (run.work_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    hook._judge(run)
    assert run.warnings == []


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"share": 1.0}, "validation_share got 1.0"),
        ({"every": -1}, "validation_every got -1"),
        ({"patience": 0}, "patience got 0"),
    ],
)
def test_mistakes(options: dict, answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        ValidationHook(**options)


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        (
            {"lr_schedule": "constant_with_warmup", "warmup_iters": 2, "max_iters": 2},
            "the run ends inside its warm-up: 2 steps of 2; lower warmup_iters",
        ),
        ({"max_iters": 600}, "240 epochs over 10 images: they will be memorized; train fewer steps"),
        ({"resolution": 64}, "the resolution is not the model's: 64 px, and it was made for 32 px"),
    ],
)
def test_settings_that_spoil_a_run_are_warned_of(toy: Toy, tmp_path: Path, settings: dict, warning: str) -> None:
    run = runs.build(toy.config("warned", **settings), tmp_path / "run")
    run.announce()
    assert [item["text"] for item in run.warnings] == [warning]
    assert f"warning: {warning}" in (tmp_path / "run" / "log.txt").read_text()


def test_a_loss_above_chance_is_warned_of(toy: Toy, tmp_path: Path) -> None:
    run = runs.build(toy.config("chance", max_iters=60, log_every=10, learning_rate=0.0), tmp_path / "run")
    run.train()
    assert [item["step"] for item in run.warnings] == [50]
    assert run.warnings[0]["text"].startswith("the loss is above chance: 4.")
    assert "and guessing gives 4.159 (ln 64)" in run.warnings[0]["text"]
