"""Metrics are correct, logged once, and read from the device only at a log line."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffengine import terminal
from diffengine.engine import memory
from diffengine.engine.hooks import MetricsHook, PreviewHook
from diffengine.text import format_duration, format_rate
from tests.engine import runs
from tests.engine.runs import WITH_TEXT_ENCODER, Toy, assert_equal, train
from tests.support.terminal import use_terminal

aten = torch.ops.aten
SYNCHRONIZING = {  # operators that make the host wait for the device
    aten._local_scalar_dense, aten.item, aten.nonzero, aten.masked_select, aten.nonzero_static, aten.equal,
    aten.is_nonzero, aten._unique2, aten.unique_consecutive, aten.bincount, aten.allclose,
    aten.repeat_interleave,
}  # fmt: skip
HOST_COPIES = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}


class HostCopies(TorchFunctionMode):
    """Counts copies of tensors to the host. On a CPU, no dispatch mode sees them."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in HOST_COPIES:
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class HostReads(TorchDispatchMode):
    """Counts operators that would wait for a GPU: reads of a value, and output sizes that depend on values."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket in SYNCHRONIZING or self._is_masked(func, args):
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def _is_masked(self, func: Any, args: tuple) -> bool:
        """Whether this indexes by booleans: only the device knows the size of the result."""
        if func.overloadpacket not in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            return False
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


@contextmanager
def device_reads() -> Iterator[Counter[str]]:
    """Counts, by name, what waits for the device inside. The tests on a GPU cover `to(device)`."""
    seen: Counter[str] = Counter()
    with HostCopies(seen), HostReads(seen):
        yield seen


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(), lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: (x > 0).nonzero(),
        lambda x: x.masked_select(x > 0), lambda x: bool((x > 0).all()), lambda x: x.sum().tolist(),
        lambda x: x.__setitem__(x > 0, 1.0), lambda x: x.cpu(), lambda x: x.numpy(), lambda x: np.asarray(x),
    ],
)  # fmt: skip
def test_the_counter_detects_a_read(read: Any) -> None:
    with device_reads() as seen:
        read(torch.arange(4.0))
    assert seen


def test_the_counter_ignores_other_operators() -> None:
    x = torch.arange(4.0)
    with device_reads() as seen:
        x.index_select(0, torch.tensor([1, 2])).add_(1).clamp(0, 2).sum().sqrt()
        torch.where(x > 1, x, 0)
    assert not seen


class CountReads(Hook):
    """Counts the reads of each iteration, from its start to `close`."""

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self.by_step: dict[int, Counter[str]] = {}

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self._context = device_reads()
        self.by_step[runner.clock.done + 1] = self._context.__enter__()

    def close(self) -> None:
        self._context.__exit__(None, None, None)


class Close(Hook):
    """Ends the count of an iteration after all other hooks."""

    priority = "LOWEST"

    def __init__(self, counter: CountReads) -> None:
        self.counter = counter

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.counter.close()


@pytest.mark.parametrize("model", ["amused", "vq"])
def test_nothing_is_read_between_log_lines(
    toy: Toy, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 and 8 are logged. Between them the step, clipping and all hooks read nothing from the device.

    Nor does the live line, which is shown at every step.
    """
    screen = use_terminal(monkeypatch)
    monkeypatch.setattr(terminal, "REFRESH", 0)
    if model == "vq":
        runner = runs.build(toy.vq_config("reads_vq", max_iters=8, log_every=8), tmp_path)
    else:
        path = toy.config("reads", max_iters=8, log_every=8, micro_batch_size=2)
        runner = runs.build(path, tmp_path, WITH_TEXT_ENCODER)
    counter = CountReads()
    runner.register_hook(counter)
    runner.register_hook(Close(counter))
    runner.train()
    seen = {step: dict(counts) for step, counts in counter.by_step.items()}
    assert {step: seen[step] for step in range(2, 8)} == {step: {} for step in range(2, 8)}
    assert seen[8]["tolist"] == 2  # one read of all sums; one, before the save, of whether the weights are finite
    assert all(f" {step}/8 loss " in "".join(screen.frames) for step in range(2, 8))
    assert set(seen[8]) == ({"tolist"} if model == "amused" else set(seen[1]))


class SumsHook(Hook):
    """Records the sum of losses, the number of targets, the number of empty captions and the norms of each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, int, int, list[float]]] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        assert outputs.targets == sum(len(row) for row in data_batch["masked"])
        assert outputs.sums["loss_t"].sum().item() == pytest.approx(outputs.sums["loss"].item(), rel=1e-6)
        dropped = data_batch["text"].count("")
        self.steps.append((outputs.sums["loss"].item(), outputs.targets, dropped, outputs.group_norms.tolist()))


def _scalars(work_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(work_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_logged_loss_is_the_mean_over_all_targets_since_the_last_line(toy: Toy, tmp_path: Path) -> None:
    settings = {"max_iters": 8, "log_every": 3, "micro_batch_size": 3, "caption_dropout": 0.5}
    runner = runs.build(toy.config("lines", **settings), tmp_path)
    sums = SumsHook()
    runner.register_hook(sums)
    runner.train()
    lines = runs.metrics(tmp_path)
    assert [line["iter"] for line in lines] == [1, 3, 6, 8]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    start = 0
    for line in lines:
        losses, targets, dropped, norms = zip(*sums.steps[start : line["iter"]])
        assert line["loss"] == pytest.approx(sum(losses) / sum(targets), rel=1e-6)
        assert 0 <= line["accuracy"] <= 1
        assert line["grad_norm"] > 0
        assert line["images_per_second"] == pytest.approx(4 / line["seconds_per_step"])
        assert line["tokens_per_second"] == pytest.approx(64 * line["images_per_second"])
        assert line["captions_dropped"] == sum(dropped) / (4 * len(dropped))
        groups = [line[f"grad_norm_{group}"] for group in runner.optim_wrapper.groups]
        assert groups == pytest.approx([sum(norm) / len(norm) for norm in zip(*norms)], rel=1e-6)
        assert {name for name in line if name.startswith("loss_t")} <= {f"loss_t{bucket}" for bucket in range(8)}
        assert 0 < line["data_wait"] < 1
        assert line["memory_gb"] > 0.1
        start = line["iter"]
    assert 0 < sum(step[2] for step in sums.steps) < 32
    scalars = _scalars(tmp_path)
    assert scalars["train/loss"] == [(line["iter"], pytest.approx(line["loss"])) for line in lines]
    names = {name.partition("/")[2] for name in scalars}
    assert names == {name for line in lines for name in line} - {"iter", "epoch", "time"} - MEMORY_METRICS
    console = [line for line in (tmp_path / "log.txt").read_text().splitlines() if " images/s " in line]
    assert len(console) == len(lines)
    assert not [line for line in console if re.search("loss_t|grad_norm_|captions|tokens", line)]


def test_metrics_change_no_weight(toy: Toy, tmp_path: Path) -> None:
    states = []
    for logged in (True, False):
        runner = runs.build(toy.config("logged", max_iters=2), tmp_path / str(logged))
        runner._hooks = [hook for hook in runner.hooks if logged or not isinstance(hook, MetricsHook)]
        runner.train()
        assert (tmp_path / str(logged) / "metrics.jsonl").exists() == logged
        states.append(runner.trainable.trained_state())
    assert_equal(*states)


MEMORY_METRICS = {"memory_weights_gb", "memory_gradients_gb", "memory_optimizer_gb", "checkpoint_gb"}


def test_memory_metrics_are_logged_once(toy: Toy, tmp_path: Path) -> None:
    """With the first line after the first step, in a resumed run too."""
    settings = {"max_iters": 8, "log_every": 3, "checkpoint_every": 4, "keep_checkpoints": 1}
    path = toy.config("sizes", cache=False, **settings)
    assert train(path, tmp_path) == 0
    lines = runs.metrics(tmp_path)
    assert [line["iter"] for line in lines if MEMORY_METRICS & set(line)] == [3]
    line = lines[1]
    assert {name for name in set(line) - set(lines[0]) if not name.startswith("loss_t")} == MEMORY_METRICS
    weights = dict(runs.build(path, tmp_path / "other").trainable.named_parameters())
    count = sum(item.numel() for item in weights.values())
    assert line["memory_gradients_gb"] == 4 * count / 1e9
    assert line["memory_optimizer_gb"] == (8 * count + 4 * len(weights)) / 1e9
    assert line["memory_weights_gb"] > 4 * count / 1e9  # includes the frozen weights
    assert line["checkpoint_gb"] == pytest.approx((tmp_path / "iter_8.pth").stat().st_size / 1e9, rel=0.01)
    log = (tmp_path / "log.txt").read_text()
    (message,) = [line for line in log.splitlines() if " memory: " in line]
    assert "memory: weights 2.8 MB, gradients 1.6 MB, optimizer 3.1 MB; on disk 2 x 4.8 MB of " in message
    assert message.endswith(" left")
    assert train(path, tmp_path, "--resume", "--cfg-options", "max_iters=11") == 0
    assert [line["iter"] for line in runs.metrics(tmp_path) if MEMORY_METRICS & set(line)] == [3]


def test_the_memory_peak_excludes_previews(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a simulated device: a step takes 2 bytes, the fifth one 3; a preview takes 9."""
    memory_used = {"peak": 0}

    def allocate(count: int) -> None:
        memory_used["peak"] = max(memory_used["peak"], count)

    monkeypatch.setattr(memory, "peak_bytes", lambda: memory_used["peak"])
    monkeypatch.setattr(memory, "reset_peak", lambda: memory_used.update(peak=0))
    monkeypatch.setattr(PreviewHook, "_generate", lambda hook, runner: allocate(9))
    path = toy.config("peaks", max_iters=6, preview_every=2, prompts=["a cat"])
    runner = runs.build(path, tmp_path)

    class StepMemory(Hook):
        priority = "VERY_HIGH"

        def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
            allocate(3 if runner.clock.done == 5 else 2)

    runner.register_hook(StepMemory())
    for hook in [hook for hook in runner.hooks if isinstance(hook, PreviewHook)]:
        monkeypatch.setattr(hook, "after_train", lambda runner: None)
    runner.train()
    assert [round(line["memory_gb"] * 1e9) for line in runs.metrics(tmp_path)] == [2, 2, 2, 2, 3, 3]


def test_the_log_explains_the_loss_of_chance_once(toy: Toy, reference: Path) -> None:
    log = (reference / "log.txt").read_text()
    assert log.count("(ln 64 = 4.159)") == 1
    assert "step 12/12  loss " in log
    assert "0:00 left" in log


def test_a_resumed_run_logs_no_step_twice_in_tensorboard(toy: Toy, tmp_path: Path) -> None:
    path = toy.config("twice", max_iters=6, checkpoint_every=2)
    assert train(path, tmp_path) == 0
    (tmp_path / "iter_6.pth").unlink()
    assert train(path, tmp_path, "--resume") == 0
    assert [step for step, _ in _scalars(tmp_path)["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [line["iter"] for line in runs.metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_diverged_run_is_reported_and_saves_nothing(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = {"learning_rate": 1e30, "clip_grad": None, "prompts": ["a cat"], "preview_every": 1}
    assert train(toy.config("nan", max_iters=4, max_bad_steps=2, **settings), tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [file.name for file in (tmp_path / "previews").glob("*.png")] == ["000000.png"]
    log = (tmp_path / "log.txt").read_text()
    for step in (1, 2):  # the third ends the run
        assert f"no preview at step {step}: the model's outputs are not finite, so it generates nothing;" in log
    assert not list(tmp_path.glob("*.pth"))
    assert not (tmp_path / "transformer").exists()
    lines = runs.metrics(tmp_path)
    assert lines[-1]["loss"] is None
    json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail)
    assert "lower the learning rate" in log
    assert math.isfinite(lines[0]["loss"])


def test_rates() -> None:
    assert [format_rate(value) for value in (0.9254, 9.254, 99.94, 105.4, 1050)] == [
        "0.925",
        "9.25",
        "99.9",
        "105",
        "1,050",
    ]


def test_durations() -> None:
    assert [format_duration(value) for value in (0.4, 61, 3600, 86399.6)] == ["0:00", "1:01", "1:00:00", "24:00:00"]
