"""The hook: what it writes and when, and that looking changes nothing."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from diffengine import report
from diffengine.engine.hooks import Hook, MetricsHook
from diffengine.report import read_run
from tests.engine.runs import Toy, assert_equal_checkpoints, in_child, metrics, signal_at, train
from tests.report.test_page import data_of


def facts(work_dir: Path) -> dict[str, Any]:
    return json.loads((work_dir / "run.json").read_text())


def test_a_run_that_ends(toy: Toy, tmp_path: Path) -> None:
    path = toy.config("ends", default_hooks={}, max_iters=4, prompts=2, preview_every=2, log_every=1)
    assert train(path, tmp_path) == 0
    known = facts(tmp_path)
    assert (known["name"], known["status"], known["step"], known["max_iters"]) == ("ends", "done", 4, 4)
    assert next(iter(known["references"])).startswith("ln ")
    assert known["data"]["images"] == 10
    assert known["data"]["epochs_per_image"] == pytest.approx(1.6)
    assert known["data"]["sizes"]["bars"] == [["40×40", 10]]
    assert known["data"]["crop_lost"] == 0
    assert len(known["data"]["thumbnails"]) == 10
    assert {"torch", "diffusers", "mmengine", "python", "device", "precision"} <= set(known["environment"])
    assert known["memory"]["trained"] > 0
    assert known["commands"]["convert"] == f"diffengine convert {tmp_path} --pipeline"
    run = data_of((tmp_path / "report.html").read_text())["runs"][0]
    assert (run["status"], run["step"], run["previews"]["steps"]) == ("done", 4, [0, 2, 4])
    assert len(run["previews"]["original"]) == len(run["previews"]["round_trip"]) == 2
    assert len(run["data"]["thumbnails"]) == 10
    assert f"the run's page: {tmp_path}/report.html" in (tmp_path / "log.txt").read_text()


def test_looking_changes_nothing(toy: Toy, tmp_path: Path) -> None:
    path = toy.config("looking", default_hooks={}, max_iters=4, prompts=2, preview_every=1, log_every=1)
    assert train(path, tmp_path / "on") == 0
    assert train(path, tmp_path / "off", "--cfg-options", "default_hooks.report=None", "prompts=[]") == 0
    assert not (tmp_path / "off" / "report.html").exists()
    assert_equal_checkpoints(tmp_path / "on" / "iter_4.pth", tmp_path / "off" / "iter_4.pth")
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("on", "off")]
    assert losses[0] == losses[1]


def test_a_run_that_is_stopped_and_resumed(toy: Toy, tmp_path: Path) -> None:
    path = toy.config("stopped", default_hooks={}, max_iters=6, prompts=1, preview_every=2)
    assert in_child(train, path, tmp_path, "--cfg-options", signal_at(3, signal.SIGTERM)) == 128 + signal.SIGTERM
    known = facts(tmp_path)
    assert (known["status"], known["step"]) == ("stopped", 3)
    run = data_of((tmp_path / "report.html").read_text())["runs"][0]
    assert run["status"] == "stopped"
    assert run["commands"]["resume"] == f"diffengine train {tmp_path}/config.py --work-dir {tmp_path} --resume"
    assert train(str(tmp_path / "config.py"), tmp_path, "--resume") == 0  # the command, word for word
    resumed = facts(tmp_path)
    assert (resumed["name"], resumed["status"], resumed["step"]) == ("stopped", "done", 6)
    assert resumed["started"] == known["started"]
    assert resumed["seconds"] > known["seconds"]


def test_a_run_that_diverges(toy: Toy, tmp_path: Path) -> None:
    settings = {"learning_rate": 1e30, "clip_grad": None, "max_iters": 3, "max_bad_steps": 2}
    assert train(toy.config("diverges", default_hooks={}, **settings), tmp_path) == 2
    known = facts(tmp_path)
    assert known["status"] == "diverged"
    assert known["error"].startswith("training diverged")
    assert read_run(tmp_path).status == "diverged"


def test_a_page_that_cannot_be_written_ends_no_run(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(report.page, "build_page", broken)
    assert train(toy.config("unwritten", default_hooks={}), tmp_path) == 0
    assert "the run's page was not written: ZeroDivisionError: by zero" in (tmp_path / "log.txt").read_text()
    assert facts(tmp_path)["status"] == "done"


def test_overwrite_deletes_what_the_page_rests_on(toy: Toy, tmp_path: Path) -> None:
    assert train(toy.config("over", default_hooks={}, max_iters=2, prompts=2, preview_every=1), tmp_path) == 0
    fewer = ["--overwrite", "--cfg-options", "prompts=[]", "max_iters=1", "default_hooks.report=None"]
    assert train(toy.config("over", default_hooks={}, max_iters=2, prompts=2, preview_every=1), tmp_path, *fewer) == 0
    assert not [name for name in ("report.html", "run.json", "report", "previews") if (tmp_path / name).exists()]


def test_a_vq_run_has_a_page(toy: Toy, tmp_path: Path) -> None:
    path = Path(toy.vq_config("vq_page", max_iters=2, log_every=1))
    text = path.read_text().replace("import CheckpointHook", "import CheckpointHook, PreviewHook, ReportHook")
    hooks = "default_hooks = dict(preview=dict(type=PreviewHook, prompts=2), report=dict(type=ReportHook),\n"
    path.write_text(text.replace("default_hooks = dict(", hooks))
    assert train(str(path), tmp_path) == 0
    assert set(facts(tmp_path)["commands"]) == {"resume", "convert"}
    assert "captions" not in facts(tmp_path)["data"]
    run = data_of((tmp_path / "report.html").read_text())["runs"][0]
    assert len(run["previews"]["images"][0]) == 2
    assert run["previews"]["original"] == []


def test_images_that_cannot_be_read_are_named(toy: Toy, tmp_path: Path) -> None:
    data = shutil.copytree(toy.data, tmp_path / "data")
    damaged = sorted(data.glob("*.png"))[3]
    damaged.write_bytes(b"no image")
    path = toy.config("damaged", default_hooks={}, data=str(data))
    assert train(path, tmp_path / "run", "--cfg-options", "skip_unreadable=True") == 0
    known = facts(tmp_path / "run")["data"]
    assert (known["images"], known["unreadable"], len(known["thumbnails"])) == (10, 1, 9)
    assert str(damaged) in known["unreadable_files"][0]


def test_a_run_that_fails(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(MetricsHook, "after_step", broken)
    assert train(toy.config("fails", default_hooks={}), tmp_path) == 1
    known = facts(tmp_path)
    assert (known["status"], known["error"]) == ("failed", "ZeroDivisionError: by zero")


def test_warnings_are_shown_once(toy: Toy, tmp_path: Path) -> None:
    hook = "custom_hooks=[{'type': 'tests.report.test_hook.WarningHook'}]"
    path = toy.config("warns", default_hooks={}, max_iters=4, checkpoint_every=2)
    assert (
        in_child(train, path, tmp_path, "--cfg-options", hook.replace("}", ", 'stop_at': 2}")) == 128 + signal.SIGTERM
    )
    assert train(path, tmp_path, "--resume", "--cfg-options", hook) == 0
    assert facts(tmp_path)["warnings"] == [{"step": 1, "text": "it is late: go to bed at step 1"}]


class WarningHook(Hook):
    """Warns after every step, and asks the run to stop after one."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at

    def after_step(self, run: Any, step: Any) -> None:
        run.warn(f"it is late: go to bed at step {run.clock.done}")
        if run.clock.done == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
