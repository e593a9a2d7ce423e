"""Tests that need a CUDA device: `make gpu`."""

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook

from tests.engine import runs
from tests.engine.runs import Toy, metrics, train

pytestmark = pytest.mark.gpu


class NoSyncHook(Hook):
    """Makes a synchronization with the device an error, except in the first two and the last two steps."""

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        forbidden = 1 < runner.clock.done < runner.train_loop.max_iters - 2
        torch.cuda.set_sync_debug_mode("error" if forbidden else "default")

    def after_train(self, runner: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cache", [True, False])
def test_steps_between_log_lines_do_not_synchronize(toy: Toy, tmp_path: Path, cache: bool) -> None:
    path = toy.config("synchronize", max_iters=8, log_every=100, image_variations=1, cache=cache)
    runner = runs.build(path, tmp_path / "run", device=torch.device("cuda", 0))
    runner.register_hook(NoSyncHook())
    runner.train()
    assert runner.clock.done == 8


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_stops_and_resumes(toy: Toy, tmp_path: Path, precision: str) -> None:
    path = toy.config("precision", max_iters=4, checkpoint_every=2, keep_checkpoints=None, precision=precision)
    assert train(path, tmp_path / "whole") == 0
    stop = ["--cfg-options", runs.signal_at(2, signal.SIGTERM)]
    assert train(path, tmp_path / "stopped", *stop) == 128 + signal.SIGTERM
    assert train(path, tmp_path / "stopped", "--resume") == 0
    whole, resumed = (metrics(tmp_path / name)[-1]["loss"] for name in ("whole", "stopped"))
    assert resumed == pytest.approx(whole, rel=1e-3)


def test_the_loss_on_a_gpu_equals_the_loss_on_a_cpu(toy: Toy, tmp_path: Path) -> None:
    path = toy.config("devices", max_iters=1, precision="fp32", cache=False)
    losses = {}
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        runner = runs.build(path, tmp_path / device.type, "train_cfg.tf32=False", device=device)
        runner.train()
        losses[device.type] = metrics(tmp_path / device.type)[0]["loss"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-2)  # rounding changes a few token ids


def test_blocks_are_compiled_in_the_first_steps_only(toy: Toy, tmp_path: Path) -> None:
    path = toy.config("compiled", max_iters=6, compile=True, precision="bf16")
    graphs: Counter = torch._dynamo.utils.counters["stats"]
    counts = []

    class CountGraphs(Hook):
        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            counts.append(graphs["unique_graphs"])

    runner = runs.build(path, tmp_path / "run", device=torch.device("cuda", 0))
    runner.register_hook(CountGraphs())
    runner.train()
    assert counts[0] > 0
    assert len(set(counts[1:])) == 1
