"""Helpers for short real training runs of a toy model."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from torch import Tensor

from diffengine import cli
from diffengine.engine import checkpoint
from diffengine.engine.build import load_config, make_job
from diffengine.engine.run import Run, build_run
from diffengine.engine.workdir import claimed
from diffengine.models.vq import VQTokenizerModel
from tests.support.processes import free_port

CPU = torch.device("cpu")
WITH_TEXT_ENCODER = "model.train=['transformer', 'text_encoder']"


@dataclass
class Toy:
    """A toy model folder, an image folder, and configs that use them."""

    model: Path
    data: Path
    root: Path

    def config(self, name: str = "toy", **settings: Any) -> str:
        """Write a config with these settings. By default, every step is logged, and previews and the page are off."""
        options = {
            "data": str(self.data), "pretrained": str(self.model), "resolution": 32, "batch_size": 4,
            "num_workers": 0, "prompts": [], "preview_every": None, "checkpoint_every": None, "log_every": 1,
            "validation_every": 0, "default_hooks": {"report": None},
            **settings,
        }  # fmt: skip
        if "max_epochs" not in options:
            options.setdefault("max_iters", 1)
        path = self.root / f"{name}.py"
        path.write_text("\n".join(['extends = "amused"', *(f"{key} = {value!r}" for key, value in options.items())]))
        return str(path)

    def vq_config(self, name: str, max_iters: int, log_every: int, batch_size: int = 4) -> str:
        """Write a config that trains the VQ model, in micro-batches of 2."""
        path = self.root / f"{name}.py"
        path.write_text(
            VQ_CONFIG.format(
                vqvae=str(self.model / "vqvae"),
                data=str(self.data),
                max_iters=max_iters,
                log_every=log_every,
                batch_size=batch_size,
            )
        )
        return str(path)


VQ_CONFIG = """
from torch.optim import AdamW
from diffengine.datasets import Crop, ImageTextDataset, Resize, ToTensor
from diffengine.engine.hooks import CheckpointHook, MetricsHook
from diffengine.models.vq import VQTokenizerModel

model = dict(type=VQTokenizerModel, vqvae={vqvae!r}, reseed_every=3, reseed_until=9)
train_dataloader = dict(
    dataset=dict(type=ImageTextDataset, path={data!r}),
    image_transforms=[dict(type=Resize, size=32), dict(type=Crop, size=32), dict(type=ToTensor)],
    batch_size={batch_size},
)
optim_wrapper = dict(optimizer=dict(type=AdamW, lr=1e-3), clip_grad=1.0)
train_cfg = dict(max_iters={max_iters}, micro_batch_size=2)
default_hooks = dict(
    metrics=dict(type=MetricsHook, every={log_every}), checkpoint=dict(type=CheckpointHook, every=None)
)
"""


def build(
    path: str,
    work_dir: Path,
    *options: str,
    resume: Path | None = None,
    overwrite: bool = False,
    device: torch.device = CPU,
) -> Run:
    """Build a run in this process, ready to train."""
    job = replace(make_job(path, *load_config(path, options), device), work_dir=work_dir)
    with claimed(work_dir, str(resume) if resume else None, overwrite) as checkpoint_path:
        return build_run(job, checkpoint_path)


def train(path: str, work_dir: Path, *flags: str) -> int:
    """Run `diffengine train` in this process; returns its exit code."""
    return cli.main(["train", path, "--work-dir", str(work_dir), *flags])


@dataclass
class FirstStep:
    """The gradients, masks and loss of one optimizer step."""

    grads: list[Tensor]
    masked: list[list[int]]
    loss_sum: float
    targets: int
    loss: float
    details: dict[str, float] = field(default_factory=dict)

    def read_line(self, work_dir: Path) -> None:
        """Take `loss` and `details` from the first line of metrics.jsonl."""
        line = metrics(work_dir)[0]
        self.loss = line["loss"]
        self.details = {
            name: line[name] for name in line if name.startswith(("loss_t", "loss/", "grad_norm", "captions"))
        }


class FirstStepHook(Hook):
    """Records the gradients, masks and loss of the first step."""

    def __init__(self) -> None:
        self.step: FirstStep | None = None
        self._grads: list[Tensor] = []

    def before_train(self, runner: Any) -> None:
        def save_gradients(optimizer: Any, args: Any, kwargs: Any) -> None:
            self._grads = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]

        runner.optim_wrapper.optimizer.register_step_pre_hook(save_gradients)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.step is None:
            masked = [row.tolist() for row in data_batch["masked"]]
            self.step = FirstStep(self._grads, masked, outputs.sums["loss"].item(), outputs.targets, 0.0)


def first_step(path: str, work_dir: Path, *options: str) -> FirstStep:
    """Train one step. `loss` and `details` are values in metrics.jsonl."""
    runner = build(path, work_dir, *options)
    hook = FirstStepHook()
    runner.register_hook(hook)
    runner.train()
    assert hook.step is not None
    if (work_dir / "metrics.jsonl").exists():
        hook.step.read_line(work_dir)
    return hook.step


def metrics(work_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]


MEASURED = ("time", "images_per_second", "seconds_per_step", "tokens_per_second", "data_wait", "memory_gb")


def results(work_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what differs between two equal runs."""
    return [{name: line[name] for name in line if name not in MEASURED} for line in metrics(work_dir)]


class SignalAt(Hook):
    """Sends a signal to this process, or to its process group, after a step."""

    def __init__(self, step: int, signum: int, group: bool = False) -> None:
        self.step, self.signum, self.group = step, signum, group

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.clock.done == self.step:
            if self.group:  # from another process: workers exit on their parent's SIGTERM
                subprocess.run(["kill", f"-{self.signum}", "--", f"-{os.getpgrp()}"], check=False)
            else:
                os.kill(os.getpid(), self.signum)
            time.sleep(0.3)  # so that workers have time to react


class BadSteps(Hook):
    """Makes the loss of some steps (from 1) infinite by the weight of their first sample, or NaN by its pixels."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if batch_idx + 1 in self.steps and isinstance(runner.trainable, VQTokenizerModel):
            data_batch["image"][0] = math.nan
        elif batch_idx + 1 in self.steps:
            data_batch["weight"] = [1e38] + [1.0] * (len(data_batch["num_targets"]) - 1)


def signal_at(step: int, signum: int, group: bool = False) -> str:
    """The config option that adds a `SignalAt` hook."""
    hook = {"type": "tests.engine.runs.SignalAt", "step": step, "signum": int(signum), "group": group}
    return f"custom_hooks=[{hook}]"


def assert_equal_checkpoints(one: Path, other: Path) -> None:
    """Check that weights, optimizer, schedule and counters are bit-identical."""
    a, b = checkpoint.read(one), checkpoint.read(other)
    assert a["counters"] == b["counters"]
    assert a["param_scheduler"] == b["param_scheduler"]
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert_equal(a["model"], b["model"])
    assert_equal(a["optimizer"]["state"], b["optimizer"]["state"])


def assert_equal(actual: Any, expected: Any, name: str = "") -> None:
    """Check that nested dicts of tensors and plain values are bit-identical (bitsandbytes nests its state)."""
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys(), name
        for key in actual:
            assert_equal(actual[key], expected[key], f"{name}.{key}")
    elif isinstance(actual, Tensor):
        assert torch.equal(actual, expected), name
    else:
        assert actual == expected, name


def in_child(function: Callable[..., int | None], *args: Any) -> int:
    """Run `function(*args)` in a child process with a new process group. Returns the exit code; -n after signal n."""
    process = _context().Process(target=_run_child, args=(function, *args))
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
        pytest.fail("the child process did not end within 120 s")
    return process.exitcode


def _context() -> Any:
    """Fork, which skips the imports; CUDA does not support it."""
    return multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")


def _run_child(function: Callable[..., int | None], *args: Any) -> None:
    os.setsid()
    code = function(*args)
    os._exit(code or 0)


def on_ranks(world: int, function: Callable[..., None], *args: Any) -> None:
    """Run `function(*args)` on `world` ranks with gloo; all must exit with 0."""
    port = free_port()
    arguments = [(rank, world, port, function, *args) for rank in range(world)]
    processes = [_context().Process(target=_run_rank, args=given) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world, f"exit codes {codes}; None means that the rank did not end within 120 s"


def _run_rank(rank: int, world: int, port: int, function: Callable[..., None], *args: Any) -> None:
    from diffengine import distributed

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    distributed.start()
    function(*args)
    distributed.stop()
    os._exit(0)
