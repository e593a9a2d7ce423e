"""A run that is stopped and resumed ends like one that never stopped."""

import json
import os
import re
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from diffengine import cli
from diffengine.commands.launch import REQUEUE
from diffengine.datasets import ImageTextDataset
from diffengine.engine import checkpoint
from diffengine.engine.build import load_config
from diffengine.engine.loop import stop_signals
from diffengine.engine.state import check_same_run
from diffengine.errors import UserError
from tests.engine import runs
from tests.engine.conftest import LAST, REFERENCE
from tests.engine.runs import Toy, assert_equal_checkpoints, in_child, signal_at, train

# 10 images, 4 a step: 5 steps; the epochs end with steps 3 and 5.
EPOCHS = {"max_epochs": 2, "checkpoint_every": 1, "log_every": 2}


def test_a_killed_and_resumed_run_is_bit_identical(toy: Toy, reference: Path, tmp_path: Path) -> None:
    """Killed at step 7, with previews; two workers before the kill and none after."""
    path = toy.config("killed", **{**REFERENCE, "num_workers": 2, "prompts": ["a cat"], "preview_every": 3})
    hook = ["--cfg-options", signal_at(7, signal.SIGKILL)]
    assert in_child(train, path, tmp_path, *hook) == -signal.SIGKILL
    assert [file.name for file in tmp_path.glob("*.pth")] == ["iter_4.pth"]
    assert [line["iter"] for line in runs.metrics(tmp_path)] == [1, 5]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iter": 7, "ep')  # left by a kill during a write
    (tmp_path / ".iter_8.pth.tmp").write_bytes(b"half")

    assert train(path, tmp_path, "--resume", "--cfg-options", "num_workers=0") == 0
    assert_equal_checkpoints(tmp_path / f"iter_{LAST}.pth", reference / f"iter_{LAST}.pth")
    assert [line["iter"] for line in runs.metrics(tmp_path)] == [1, 5, 10, 12]
    assert runs.results(tmp_path) == runs.results(reference)
    assert not list(tmp_path.glob(".*.tmp"))


def test_previews_and_workers_do_not_change_training(toy: Toy, reference: Path, tmp_path: Path) -> None:
    settings = {**REFERENCE, "num_workers": 2, "prompts": 2, "preview_every": 4}
    assert train(toy.config("previewed", **settings), tmp_path) == 0
    assert_equal_checkpoints(tmp_path / f"iter_{LAST}.pth", reference / f"iter_{LAST}.pth")
    previews = sorted(file.name for file in (tmp_path / "previews").glob("*.png"))
    assert previews == ["000000.png", "000004.png", "000008.png", "000012.png"]
    assert (tmp_path / "before_after.png").exists()


@pytest.fixture(scope="module")
def epochs(toy: Toy) -> Path:
    """The work dir of an uninterrupted run of two epochs."""
    work_dir = toy.root / "epochs"
    assert train(toy.config("epochs", **EPOCHS), work_dir) == 0
    return work_dir


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(toy: Toy, epochs: Path, tmp_path: Path, signum: int, code: int) -> None:
    """In the middle of the second epoch of a run whose length is set in epochs."""
    path = toy.config("stopped", **EPOCHS)
    assert train(path, tmp_path, "--cfg-options", signal_at(4, signum)) == code
    assert sorted(file.name for file in tmp_path.glob("*.pth")) == ["epoch_1.pth", "iter_4.pth"]
    assert checkpoint.read(tmp_path / "iter_4.pth")["counters"] == {"iter": 4, "epoch": 1}
    assert [line["iter"] for line in runs.metrics(tmp_path)] == [1, 2, 4]
    assert not (tmp_path / "transformer").exists()
    assert train(path, tmp_path, "--resume") == 0
    assert_equal_checkpoints(tmp_path / "epoch_2.pth", epochs / "epoch_2.pth")
    assert runs.results(tmp_path) == runs.results(epochs)
    assert (tmp_path / "transformer").is_dir()


@pytest.mark.parametrize(
    ("signum", "job", "code"),
    [(signal.SIGTERM, None, 143), (signal.SIGUSR1, "7", REQUEUE)],
    ids=["SIGTERM", "pre-empted by Slurm"],
)
def test_a_signal_to_the_process_group_saves_and_workers_ignore_it(
    toy: Toy, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, job: str | None, code: int
) -> None:
    """Slurm, systemd and terminals send signals to the workers of the loader too."""
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    path = toy.config("group", **{**REFERENCE, "num_workers": 2})
    hook = ["--cfg-options", signal_at(5, signum, group=True)]
    assert in_child(train, path, tmp_path, *hook) == code
    assert (tmp_path / "iter_5.pth").exists()
    assert train(path, tmp_path, "--resume", str(tmp_path / "iter_5.pth")) == 0
    assert_equal_checkpoints(tmp_path / f"iter_{LAST}.pth", reference / f"iter_{LAST}.pth")
    assert runs.results(tmp_path) == runs.results(reference)


def test_a_second_signal_stops_at_once() -> None:
    for signum, stopped in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)):
        with stop_signals() as stop:
            os.kill(os.getpid(), signum)
            os.kill(os.getpid(), signum)  # torchrun repeats the first one
            assert stop.signum == signum
            stop.at -= 1.1
            with pytest.raises(stopped):
                os.kill(os.getpid(), signum)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_which_options_a_resumed_run_may_change(
    toy: Toy, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "iter_8.pth").symlink_to(reference / "iter_8.pth")
    path = toy.config("reference", **REFERENCE)
    assert train(path, tmp_path, "--resume", "--cfg-options", "learning_rate=2e-3") == 2
    error = capsys.readouterr().err
    assert "learning_rate was 0.001 and is 0.002" in error
    assert error.count("\n") == 1
    free = ["max_iters=9", "num_workers=1", "micro_batch_size=2", "log_every=1", "keep_checkpoints=None"]
    assert train(path, tmp_path, "--resume", "--cfg-options", *free) == 0
    assert checkpoint.read(tmp_path / "iter_9.pth")["counters"]["iter"] == 9


def test_resuming_an_older_checkpoint_next_to_a_newer_one_is_refused(
    toy: Toy, reference: Path, capsys: pytest.CaptureFixture
) -> None:
    older = str(reference / "iter_8.pth")
    assert (
        cli.main(["train", toy.config("reference", **REFERENCE), "--work-dir", str(reference), "--resume", older]) == 2
    )
    assert "holds 'iter_12.pth', which is further than" in capsys.readouterr().err


class NewOptionsDataset(ImageTextDataset):
    """A data set whose options were added after a checkpoint was written."""

    def __init__(self, path: str, brightness: float = 1.0, sides: tuple[int, ...] = (1, 2)) -> None:
        super().__init__(path)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"brightness": "${one}", "sides": [1, 2]}, None),  # equal to the defaults
        ({"brightness": "${one}"}, {}, None),
        ({}, {"brightness": 2.0}, "train_dataloader.dataset.brightness was 1.0 and is 2.0"),
        ({"sides": [3]}, {"sides": "${two}"}, "config: two was [3] and is [1, 2]"),
        ({"sides": "${three}"}, {}, "config: three was [3] and is [1, 2]"),
    ],
)
def test_new_options_of_a_class_count_with_their_defaults(
    toy: Toy, tmp_path: Path, before: dict, now: dict, message: str | None
) -> None:
    def settings(options: dict) -> dict:
        references = {"${one}": 1.0, "${two}": [1, 2], "${three}": [3]}
        used = {name[2:-1]: value for name, value in references.items() if name in options.values()}
        dataset = {"type": "tests.engine.test_resume.NewOptionsDataset", "path": "${data}", **options}
        return load_config(toy.config("options", **used, train_dataloader={"dataset": dataset}))[0]

    state = {"config": json.dumps(settings(before))}
    with pytest.raises(UserError, match=re.escape(message)) if message else nullcontext():
        check_same_run(state, settings(now), tmp_path / "iter_1.pth")


def test_new_sections_and_settings_of_a_base_config_are_not_a_change(toy: Toy, tmp_path: Path) -> None:
    settings, _ = load_config(toy.config("newer"))
    older = {key: value for key, value in settings.items() if key not in ("param_scheduler", "seed")}
    older = {key: value for key, value in older.items() if key not in ("lr_schedule", "warmup_iters")}
    del older["train_dataloader"]["image_transforms"][1]["p"], older["flip"]  # 0.5, the default of Flip
    state = {"config": json.dumps(older)}
    check_same_run(state, load_config(toy.config("newer"))[0], tmp_path / "iter_1.pth")
    other, _ = load_config(toy.config("newer", flip=0.25, warmup_iters=1))
    message = "iter_1.pth' under another config: flip was 0.5 and is 0.25; warmup_iters was 0 and is 1; repeat"
    with pytest.raises(UserError, match=message):
        check_same_run(state, other, tmp_path / "iter_1.pth")


def test_a_class_that_a_checkpoint_names_is_not_imported(toy: Toy, tmp_path: Path) -> None:
    settings, _ = load_config(toy.config("named"))
    older = json.loads(json.dumps(settings))
    older["train_dataloader"]["dataset"] = {"type": "this.poem", "path": "${data}"}
    with pytest.raises(UserError, match=r"dataset.type was 'this.poem' and is 'diffengine"):
        check_same_run({"config": json.dumps(older)}, settings, tmp_path / "iter_1.pth")
    assert "this" not in sys.modules
