"""Steps whose loss or gradients are not finite."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from diffengine.engine import checkpoint
from diffengine.engine.mmengine_seam import Hook
from tests.engine import runs
from tests.engine.runs import BadSteps, Toy, assert_equal, train


class Undo(Hook):
    """Puts weights, buffers and the optimizer's state back after a step."""

    priority = "HIGHEST"

    def __init__(self, undone: int) -> None:
        self.undone = undone

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if batch_idx + 1 == self.undone:
            self.weights = deepcopy(runner.trainable.state_dict())
            self.buffers = [buffer.clone() for buffer in runner.trainable.buffers()]
            self.state = deepcopy(runner.optim_wrapper.optimizer.state_dict()["state"])

    def after_step(self, run: Any, step: Any) -> None:
        if run.clock.done == self.undone:
            run.trainable.load_state_dict(self.weights)
            for buffer, before in zip(run.trainable.buffers(), self.buffers):
                buffer.copy_(before)
            optimizer = run.optim_wrapper.optimizer
            optimizer.load_state_dict({**optimizer.state_dict(), "state": self.state})


def bad(*steps: int) -> list[dict]:
    return [{"type": "tests.engine.runs.BadSteps", "steps": list(steps)}]


@pytest.mark.parametrize("model", ["amused", "vq"])
def test_a_bad_step_leaves_nothing_behind(toy: Toy, tmp_path: Path, model: str) -> None:
    """The same as if the step were taken and undone, with the same steps, schedule and samples after it."""
    finals = []
    for name, hook in (("bad", BadSteps([3])), ("undone", Undo(3))):
        if model == "vq":
            runner = runs.build(toy.vq_config(name, max_iters=6, log_every=1), tmp_path / name)
        else:
            settings = {"max_iters": 6, "log_every": 1, "lr_schedule": "cosine", "warmup_iters": 2}
            runner = runs.build(toy.config(name, **settings), tmp_path / name)
        runner.register_hook(hook)
        runner.train()
        finals.append(checkpoint.read(tmp_path / name / "iter_6.pth"))
    for entry in ("model", "optimizer", "param_scheduler", "counters"):
        assert_equal(finals[0][entry], finals[1][entry], entry)
    lines, others = (runs.results(tmp_path / name) for name in ("bad", "undone"))
    assert lines[2]["loss"] is None
    assert lines[2]["bad_steps"] == 1
    assert "bad_steps" not in str(lines[:2] + lines[3:])
    assert lines[3:] == others[3:]


def test_a_bad_step_does_not_count_in_the_average_nor_in_means(toy: Toy, tmp_path: Path) -> None:
    """Two runs, of one line per step and of one line in all."""
    lines = []
    for every in (1, 5):
        settings = {
            "max_iters": 5,
            "log_every": every,
            "custom_hooks": [{"type": "diffengine.engine.hooks.EMAHook"}, *bad(2, 5)],
        }
        assert train(toy.config(f"ema{every}", **settings), tmp_path / str(every)) == 0
        lines.append(runs.results(tmp_path / str(every)))
    assert checkpoint.read(tmp_path / "1" / "iter_5.pth")["ema"]["updates"] == 3
    single, (first, rest) = lines
    assert first == single[0]
    assert rest["bad_steps"] == 2
    assert rest["grad_norm"] == pytest.approx((single[2]["grad_norm"] + single[3]["grad_norm"]) / 2)
    assert min(single[2]["loss"], single[3]["loss"]) < rest["loss"] < max(single[2]["loss"], single[3]["loss"])


def test_too_many_bad_steps_end_the_run(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Bad steps in a row are counted over lines and a resume; one good step starts the count again."""
    settings = {"max_iters": 20, "log_every": 2, "max_bad_steps": 4, "checkpoint_every": 5, "batch_size": 2}
    path = toy.config("ends", **settings, custom_hooks=bad(2, 3, 4, *range(9, 21)))
    work_dir = tmp_path / "run"
    assert train(path, work_dir) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert (
        "training diverged: loss or gradients of 4 steps in a row are not finite, the first is step 9 (positions "
        in line
    )
    assert f"the last good checkpoint is '{work_dir / 'iter_5.pth'}'" in line
    stream = runs.build(path, tmp_path / "other").train_loop.stream
    for position in (16, 17):
        assert stream.dataset.name(stream.locate(position)[1]) in line
    assert printed.out.count("warning: bad steps are skipped: loss or gradients of step 2 (positions 2 to 3: ") == 1
    assert sorted(file.name for file in work_dir.glob("*.pth")) == ["iter_10.pth", "iter_5.pth"]
    assert train(path, work_dir, "--resume") == 2  # from step 10: the first two of the four are in the checkpoint
    assert "the first is step 9 " in capsys.readouterr().err
    assert runs.metrics(work_dir)[-1]["iter"] == 12


def test_a_step_is_bad_on_all_ranks(toy: Toy) -> None:
    """Only the first sample of rank 0 is bad; neither rank learns from the step."""
    work_dir = toy.root / "bad_ranks"
    work_dir.mkdir()
    runs.on_ranks(2, _train_bad, toy, work_dir)
    assert_equal(*(checkpoint.read(work_dir / f"{name}.pth")["model"] for name in ("before", "after")))
    line = runs.metrics(work_dir / "run")[-1]
    assert (line["iter"], line["bad_steps"], line["loss"]) == (3, 1, None)
    assert math.isfinite(runs.metrics(work_dir / "run")[0]["loss"])


def _train_bad(toy: Toy, work_dir: Path) -> None:
    from diffengine import distributed

    path = toy.config(f"bad_rank{distributed.rank()}", max_iters=3, log_every=1)
    runner = runs.build(path, work_dir / "run")
    if distributed.rank() == 0:
        runner.register_hook(BadSteps([3]))
    runner.train(2)
    runner.save_checkpoint(str(work_dir), "before.pth")
    runner.train(1)
    runner.save_checkpoint(str(work_dir), "after.pth")
