"""Hooks of others: the moments at which ours are called, and every hook of mmengine in `custom_hooks`."""

from pathlib import Path
from typing import Any

import mmengine.hooks
import pytest
import torch

from diffengine import cli
from diffengine.engine import checkpoint
from diffengine.engine.hooks import Hook
from diffengine.engine.run import Run
from diffengine.engine.step import Step
from tests.engine.runs import Toy, assert_equal_checkpoints, build, train

OPTIONS: dict[str, dict[str, Any]] = {
    "CheckpointHook": {"interval": 2, "by_epoch": False},
    "EarlyStoppingHook": {"monitor": "loss"},
    "PrepareTTAHook": {"tta_cfg": {}},
    "ProfilerHook": {"by_epoch": False, "profile_times": 1},
}
REFUSED = {
    "DistSamplerSeedHook": "leave it out",
    "EMAHook": "use diffengine.engine.hooks.EMAHook",
    "EarlyStoppingHook": "leave it out",
    "LoggerHook": "use diffengine.engine.hooks.MetricsHook",
    "RuntimeInfoHook": "use diffengine.engine.hooks.MetricsHook",
}
NAMES = sorted({*mmengine.hooks.__all__} - {"Hook", "NPUProfilerHook"})


class Moments(Hook):
    """Notes when it is called, and how many steps are done then."""

    def __init__(self) -> None:
        self.called: list[tuple[str, int]] = []

    def before_run(self, run: Run) -> None:
        self.called.append(("before_run", run.clock.done))

    def before_train(self, run: Run) -> None:
        self.called.append(("before_train", run.clock.done))

    def after_step(self, run: Run, step: Step) -> None:
        assert step.samples == 4
        self.called.append(("after_step", run.clock.done))

    def after_train(self, run: Run) -> None:
        self.called.append(("after_train", run.clock.done))

    def before_save_checkpoint(self, run: Run, checkpoint: dict) -> None:
        checkpoint["moments"] = len(self.called)

    def after_load_checkpoint(self, run: Run, checkpoint: dict) -> None:
        self.called.append(("after_load_checkpoint", checkpoint["moments"]))


class Averaging(mmengine.hooks.EMAHook):
    """A subclass of a hook that cannot work."""


def custom(*hooks: dict[str, Any]) -> str:
    return f"custom_hooks={list(hooks)}"


def test_moments(toy: Toy, tmp_path: Path) -> None:
    path = toy.config("moments", max_iters=2, checkpoint_every=1)
    run = build(path, tmp_path / "run", custom({"type": "tests.engine.test_hooks.Moments"}))
    (hook,) = [hook for hook in run.hooks if isinstance(hook, Moments)]
    run.train()
    steps = [("after_step", 1), ("after_step", 2)]
    assert hook.called == [("before_run", 0), ("before_train", 0), *steps, ("after_train", 2)]
    first = tmp_path / "run/iter_1.pth"
    assert checkpoint.read(first)["moments"] == 3
    run = build(path, tmp_path / "other", custom({"type": "tests.engine.test_hooks.Moments"}), resume=first)
    (hook,) = [hook for hook in run.hooks if isinstance(hook, Moments)]
    assert hook.called == [("after_load_checkpoint", 3)]


@pytest.fixture(scope="module")
def alone(toy: Toy) -> Path:
    """The last checkpoint of a run without custom hooks."""
    assert train(toy.config("alone", max_iters=4), toy.root / "alone") == 0
    return toy.root / "alone/iter_4.pth"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_a_hook_of_mmengine_works(name: str, toy: Toy, alone: Path, tmp_path: Path) -> None:
    hook = {"type": f"mmengine.hooks.{name}", **OPTIONS.get(name, {})}
    assert train(toy.config("alone", max_iters=4), tmp_path / "run", "--cfg-options", custom(hook)) == 0
    assert_equal_checkpoints(alone, tmp_path / "run/iter_4.pth")


@pytest.mark.parametrize("name", REFUSED)
def test_a_hook_of_mmengine_is_refused(name: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hook = {"type": f"mmengine.hooks.{name}", **OPTIONS.get(name, {})}
    assert train(toy.config("alone", max_iters=4), tmp_path / "run", "--cfg-options", custom(hook)) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"diffengine train: error: custom_hooks got {name}, which cannot work here; ")
    assert REFUSED[name] in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run/config.py").exists()


def test_a_subclass_is_refused(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hook = custom({"type": "tests.engine.test_hooks.Averaging"})
    assert train(toy.config("alone", max_iters=4), tmp_path / "run", "--cfg-options", hook) == 2
    assert "got Averaging, which cannot work here; use diffengine.engine.hooks.EMAHook" in capsys.readouterr().err


def test_a_hook_that_lacks_a_package(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hook = custom({"type": "mmengine.hooks.NPUProfilerHook"})
    assert train(toy.config("alone", max_iters=4), tmp_path / "run", "--cfg-options", hook) == 2
    message = "mmengine.hooks.NPUProfilerHook needs a package that is missing (Failed to import torch_npu module)"
    assert message in capsys.readouterr().err


def test_checkpoints_of_mmengines_hook_resume(toy: Toy, alone: Path, tmp_path: Path) -> None:
    """They are in our format, so the run continues from one, and anyone can read it."""
    path, work_dir = toy.config("alone", max_iters=4), tmp_path / "run"
    hook = {"type": "mmengine.hooks.CheckpointHook", **OPTIONS["CheckpointHook"]}
    options = ["--cfg-options", "default_hooks.checkpoint=None", custom(hook)]
    assert train(path, work_dir, *options) == 0
    assert sorted(file.name for file in work_dir.glob("*.pth")) == ["iter_2.pth", "iter_4.pth"]
    assert torch.load(work_dir / "iter_2.pth", weights_only=True)["counters"] == {"iter": 2, "epoch": 0}
    (work_dir / "iter_4.pth").unlink()
    assert cli.main(["train", path, "--work-dir", str(work_dir), "--resume", *options]) == 0
    assert_equal_checkpoints(alone, work_dir / "iter_4.pth")
