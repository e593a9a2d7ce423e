"""Numbers of the run: to the console, to `metrics.jsonl` and to the visualizer's backends."""

import json
import math
import time
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from torch import Tensor

from diffengine import distributed
from diffengine.engine.hooks.checkpoint import CheckpointHook
from diffengine.engine.hooks.ema import EMAHook
from diffengine.engine.hooks.preview import PreviewHook
from diffengine.engine.loop import Step
from diffengine.engine.measure import checkpoint_bytes, kept_at_once, memory_of, peak_bytes, reset_peak
from diffengine.errors import UserError
from diffengine.files import write_text
from diffengine.text import format_bytes, format_duration

GRAD_NORM = "grad_norm"
FOLDED = 256  # steps whose sums are kept apart, before they are added up


@final
class MetricsHook(Hook):
    """Adds up on the device and reads it once per log line, never in between.

    `memory_gb` is the most that was taken in training so far, previews apart on a GPU. With the first line
    after the first step come, once, the parts of it, and what checkpoints take.

    Args:
        every: optimizer steps between two lines (always steps). The first and the last step have a line as
            well.
    """

    priority = "ABOVE_NORMAL"

    def __init__(self, every: int = 10) -> None:
        if every < 1:
            raise UserError(f"log interval `every` got {every}; expected at least 1")
        self.every = every
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}  # one a step, on the device
        self._targets: float = 0
        self._steps = self._samples = self._skipped = 0
        self._wait = self._seconds = 0.0

    def before_train(self, runner: Any) -> None:
        self._file = Path(runner.work_dir) / "metrics.jsonl"
        self._first = runner.train_loop.done + 1
        self._began = math.inf
        self._peak = 0
        self._drew = True  # the first preview is drawn after this
        self._previews = [hook.every for hook in runner.hooks if isinstance(hook, PreviewHook)]
        self._told = False
        if distributed.rank() == 0:
            _drop_after(self._file, runner.train_loop.done)
        self._clear()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if self._drew:
            reset_peak()
            self._drew = False

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Step | None = None
    ) -> None:
        assert outputs is not None
        self._began = min(self._began, time.perf_counter() - outputs.seconds)
        sums = outputs.sums if outputs.grad_norm is None else {**outputs.sums, GRAD_NORM: outputs.grad_norm}
        for name, value in sums.items():
            self._sums.setdefault(name, []).append(value)
        self._targets += outputs.targets
        self._steps += 1
        if self._steps % FOLDED == 0:
            self._sums = {name: [torch.stack(values).sum()] for name, values in self._sums.items()}
        self._samples += outputs.samples
        self._skipped += outputs.skipped
        self._rate = outputs.learning_rate
        self._wait += outputs.data_wait
        self._seconds += outputs.seconds
        loop = runner.train_loop
        if loop.done % self.every == 0 or loop.done in (self._first, loop.max_iters):
            self._line(runner)
        # A preview comes after this hook, and brings back encoders and the VQ decoder. So the peak before it
        # is noted, and from the next step on it is counted anew: `memory_gb` is training's own.
        if any(loop.due(every) for every in self._previews):
            self._peak = self._training_peak()
            self._drew = True

    def on_interrupt(self, runner: Any) -> None:
        """Tell of the steps since the last line."""
        if self._steps:
            self._line(runner)

    def _line(self, runner: Any) -> None:
        """Read the device, once, and write one line everywhere."""
        metrics = self._read(runner)
        self._clear()
        if distributed.rank() != 0:
            return
        loop = runner.train_loop
        parts, said = self._parts(runner)
        line = {"iter": loop.done, "epoch": loop.epochs_done, **metrics, **parts}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: _json(value) for name, value in line.items()}) + "\n")
        runner.visualizer.add_scalars(metrics, step=loop.done)
        runner.logger.info(self._console(runner, metrics))
        if said:
            runner.logger.info(said)
        if not math.isfinite(metrics["loss"]):
            runner.logger.info(
                f"the loss is {metrics['loss']}: lower the learning rate, or set precision to bf16 or fp32"
            )

    def _read(self, runner: Any) -> dict[str, float]:
        started = time.perf_counter()
        targets, skipped = distributed.add_counts(self._targets, self._skipped)
        packed = torch.stack([torch.stack(values).float().sum() for values in self._sums.values()])
        if distributed.world_size() > 1:
            dist.all_reduce(packed)
        metrics = {name: value / targets for name, value in zip(self._sums, packed.tolist())}
        if GRAD_NORM in metrics:  # a mean over steps, and equal on all ranks
            metrics[GRAD_NORM] *= targets / (self._steps * distributed.world_size())
        seconds = self._seconds + time.perf_counter() - started  # the read waited for what was still running
        metrics |= runner.trainable.gauges()
        metrics["lr"] = self._rate
        metrics["images_per_second"] = self._samples / seconds
        metrics["seconds_per_step"] = seconds / self._steps
        metrics["data_wait"] = self._wait / seconds
        metrics["memory_gb"] = self._training_peak() / 1e9
        if skipped:
            metrics["skipped_pictures"] = skipped
        return metrics

    def _training_peak(self) -> int:
        """Bytes. What came after a preview, and before the next step, is the preview's."""
        return self._peak if self._drew else max(self._peak, peak_bytes())

    def _parts(self, runner: Any) -> tuple[dict[str, float], str]:
        """What of memory is for what, and what checkpoints take: as numbers in GB, and in words; once."""
        loop = runner.train_loop
        if self._told or loop.done == self._first:
            return {}, ""
        self._told = True
        model, optimizer = runner.trainable, runner.optim_wrapper.optimizer
        average = next((hook.weights for hook in runner.hooks if isinstance(hook, EMAHook)), {})
        memory = memory_of(model, optimizer, average)
        sizes = {
            "weights": memory.trained + memory.frozen,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
        }
        if average:
            sizes["average"] = memory.average
        if torch.cuda.is_available():  # a process's peak has too much else in it
            sizes["activations"] = max(0, self._training_peak() - memory.total)
        said = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
        numbers = {f"memory_{name}_gb": size / 1e9 for name, size in sizes.items()}
        checkpoints = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
        if checkpoints:
            size = checkpoint_bytes(model, optimizer, average)
            numbers["checkpoint_gb"] = size / 1e9
            count = kept_at_once(checkpoints[0].every, checkpoints[0].keep, loop)
            said += f"; on disk {count} x {format_bytes(size)} of checkpoints at a time"
        return numbers, f"memory: {said}; {self._left(runner)} left"

    def _left(self, runner: Any) -> str:
        """The time to the end, previews and all."""
        loop = runner.train_loop
        per_step = (time.perf_counter() - self._began) / (loop.done - self._first + 1)
        return format_duration(per_step * (loop.max_iters - loop.done))

    def _console(self, runner: Any, metrics: dict[str, float]) -> str:
        loop = runner.train_loop
        chance = runner.trainable.chance_loss
        beside = f" ({chance[0]} = {chance[1]:.3f})" if chance and loop.done == self._first else ""
        apart = {"loss", "lr", "images_per_second", "seconds_per_step", "data_wait", "memory_gb"}
        extra = "".join(f"  {name} {value:.4g}" for name, value in metrics.items() if name not in apart)
        left = self._left(runner)
        where = f"epoch {loop.epochs_done}/{loop.max_epochs}  " if loop.by_epoch else ""
        return (
            f"{where}step {loop.done}/{loop.max_iters}  loss {metrics['loss']:.4f}{beside}{extra}  "
            f"lr {metrics['lr']:.2e}  {metrics['images_per_second']:.3g} images/s  "
            f"data wait {metrics['data_wait']:.0%}  memory {metrics['memory_gb']:.2f} GB  {left} left"
        )


def _json(value: float) -> float | None:
    """The value as JSON knows it: null for what is not finite."""
    return value if math.isfinite(value) else None


def _drop_after(file: Path, iteration: int) -> None:
    """Keep the lines up to the step a resumed run starts from, so that none stands twice; drop a half one."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("}\n") and json.loads(line)["iter"] <= iteration:
            kept.append(line)
    write_text(file, "".join(kept))
