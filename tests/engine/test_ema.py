"""EMA: its formula, which weights it covers, resume, previews and convert."""

import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UVit2DModel
from mmengine.hooks import Hook
from torch import Tensor

from diffengine import cli
from diffengine.engine import checkpoint
from diffengine.engine.hooks import EMAHook
from diffengine.engine.hooks.checkpoint import expected_size
from diffengine.errors import UserError
from tests.engine import runs
from tests.engine.runs import WITH_TEXT_ENCODER, Toy, assert_equal_checkpoints, in_child, train

EMA = {"type": "diffengine.engine.hooks.EMAHook", "decay": 0.5}
AveragedRun = tuple[Path, list[dict[str, Tensor]]]  # its work dir, and its weights by step
SETTINGS = {"max_iters": 6, "checkpoint_every": 2, "keep_checkpoints": None, "learning_rate": 1e-2,
            "custom_hooks": [EMA]}  # fmt: skip


class WeightsHook(Hook):
    """Records the weights before the first step and after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def before_train(self, runner: Any) -> None:
        self._record(runner)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._record(runner)

    def _record(self, runner: Any) -> None:
        self.steps.append({name: item.clone() for name, item in runner.trainable.trained_state().items()})


@pytest.fixture(scope="module")
def averaged_run(toy: Toy) -> AveragedRun:
    """An uninterrupted run of six steps with EMA."""
    work_dir = toy.root / "averaged"
    runner = runs.build(toy.config("averaged", **SETTINGS), work_dir, WITH_TEXT_ENCODER)
    hook = WeightsHook()
    runner.register_hook(hook)
    runner.train()
    return work_dir, hook.steps


def test_the_average_follows_its_formula(averaged_run: AveragedRun) -> None:
    work_dir, steps = averaged_run
    saved = checkpoint.read(work_dir / "iter_6.pth")["ema"]
    assert saved["updates"] == 6
    assert list(saved["weights"]) == [name for name in steps[0] if "position_ids" not in name]  # no buffers
    for name, average in saved["weights"].items():
        expected = steps[0][name].double()
        for update, weights in enumerate(steps[1:]):
            decay = min(0.5, (1 + update) / (10 + update))
            expected = decay * expected + (1 - decay) * weights[name].double()
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(average, steps[-1][name])


def test_the_decay_warms_up() -> None:
    hook = EMAHook()
    steps = torch.tensor([0, 1, 8, 10**6], dtype=torch.float64)
    assert hook.decay_at(steps).tolist() == [1 / 10, 2 / 11, 9 / 18, 0.9999]
    assert EMAHook(0.9, warmup=False).decay_at(steps).tolist() == [0.9] * 4
    for decay in (0, 1, -0.5, math.nan):
        with pytest.raises(UserError, match=f"got decay={decay}; expected a number between 0 and 1"):
            EMAHook(decay)


def test_a_killed_and_resumed_run_is_bit_identical(toy: Toy, averaged_run: AveragedRun, tmp_path: Path) -> None:
    path = toy.config("averaged", **SETTINGS)
    kill = {"type": "tests.engine.runs.SignalAt", "step": 3, "signum": int(signal.SIGKILL)}
    flags = ["--cfg-options", WITH_TEXT_ENCODER]
    assert in_child(train, path, tmp_path, *flags, f"custom_hooks={[EMA, kill]}") == -signal.SIGKILL
    assert train(path, tmp_path, "--resume", *flags) == 0
    for name in ("iter_4.pth", "iter_6.pth"):
        assert_equal_checkpoints(tmp_path / name, averaged_run[0] / name)
        resumed, expected = (checkpoint.read(folder / name)["ema"] for folder in (tmp_path, averaged_run[0]))
        assert resumed["updates"] == expected["updates"]
        assert resumed["weights"].keys() == expected["weights"].keys()
        assert all(torch.equal(resumed["weights"][key], expected["weights"][key]) for key in expected["weights"])


def test_a_resumed_run_can_start_an_average(toy: Toy, reference: Path, tmp_path: Path) -> None:
    from tests.engine.conftest import REFERENCE

    path = toy.config("reference", **REFERENCE)
    runner = runs.build(path, tmp_path, f"custom_hooks={[EMA]}", "max_iters=9", resume=reference / "iter_8.pth")
    runner.call_hook("before_run")
    assert expected_size(runner) == 4 * sum(4 * p.numel() for p in runner.trainable.parameters())
    runner.train()
    before, after = (checkpoint.read(file) for file in (reference / "iter_8.pth", tmp_path / "iter_9.pth"))
    assert after["ema"]["updates"] == 1
    name, average = next(iter(after["ema"]["weights"].items()))
    torch.testing.assert_close(average, 0.1 * before["model"][name] + 0.9 * after["model"][name])


def test_the_average_changes_only_previews(toy: Toy, tmp_path: Path) -> None:
    """Previews are generated with the average; afterwards the trained weights are back, bit for bit."""
    settings = {
        **SETTINGS,
        "max_iters": 3,
        "checkpoint_every": None,
        "prompts": ["a cat"],
        "preview_every": 3,
    }
    with_average, without = tmp_path / "with", tmp_path / "without"
    runner = runs.build(toy.config("with", **settings), with_average)
    pointers = {name: item.data_ptr() for name, item in runner.trainable.named_parameters()}
    runner.train()
    assert {name: item.data_ptr() for name, item in runner.trainable.named_parameters()} == pointers
    assert train(toy.config("without", **{**settings, "custom_hooks": []}), without) == 0
    assert_equal_checkpoints(with_average / "iter_3.pth", without / "iter_3.pth")
    previews = [
        (folder / "previews" / f"{step:06}.png").read_bytes() for folder in (with_average, without) for step in (0, 3)
    ]
    assert previews[0] == previews[2]
    assert previews[1] != previews[3]

    message = f"what a run exports at its end are the weights of the last step: diffengine convert {with_average} --ema"
    logs = [(folder / "log.txt").read_text() for folder in (with_average, without)]
    assert [message in log for log in logs] == [True, False]
    exported = UVit2DModel.from_pretrained(with_average / "transformer").state_dict()
    last = checkpoint.read(with_average / "iter_3.pth")["model"]
    assert all(torch.equal(item, last[f"transformer.{name}"]) for name, item in exported.items())

    trained = {name: item.clone() for name, item in runner.trainable.named_parameters()}
    average = checkpoint.read(with_average / "iter_3.pth")["ema"]["weights"]
    with runner.averaged_weights():
        swapped = {name: item.clone() for name, item in runner.trainable.named_parameters()}
    for name, item in runner.trainable.named_parameters():
        assert torch.equal(swapped[name], average[name])
        assert torch.equal(item, trained[name])


def test_convert_writes_the_average(
    toy: Toy, averaged_run: AveragedRun, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, file = toy.config("averaged", **SETTINGS), averaged_run[0] / "iter_6.pth"
    state = checkpoint.read(file)
    weights = {"--ema": state["ema"]["weights"], None: state["model"]}
    for flag, expected in weights.items():
        out = tmp_path / str(flag)
        assert cli.main(["convert", path, str(file), str(out), *([flag] if flag else [])]) == 0
        loaded = UVit2DModel.from_pretrained(out / "transformer").state_dict()
        assert all(torch.equal(item, expected[f"transformer.{name}"]) for name, item in loaded.items())
    assert train(toy.config("plain"), tmp_path / "plain") == 0
    assert cli.main(["convert", str(tmp_path / "plain"), "--ema"]) == 2
    error = capsys.readouterr().err
    assert "iter_1.pth' keeps no average; train with EMAHook among custom_hooks, or leave out --ema" in error
    assert error.count("\n") == 1


def test_the_average_covers_trained_weights_and_reads_nothing_from_the_device(toy: Toy, tmp_path: Path) -> None:
    from tests.engine.test_metrics import device_reads

    runner = runs.build(toy.config("reads_ema", **SETTINGS), tmp_path, "model.train=['text_encoder']")
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    hook.before_run(runner)
    with device_reads() as reads:
        hook.after_train_iter(runner, 0, outputs=SimpleNamespace(bad=torch.tensor(False)))
    assert not reads
    trained = {name for name, _ in runner.trainable.text_encoder.named_parameters()}
    assert runner.average.keys() == {f"text_encoder.{name}" for name in trained}
    assert {item.dtype for item in runner.average.values()} == {torch.float32}
