"""Numbers of the run: to the console, to `metrics.jsonl` and to the visualizer's backends."""

import json
import math
import time
from collections import Counter
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

from diffengine import distributed
from diffengine.engine.loop import Step
from diffengine.engine.mmengine_seam import Hook
from diffengine.engine.run import Run
from diffengine.errors import Diverged, require
from diffengine.files import write_text
from diffengine.terminal import LiveLine, Progressed
from diffengine.text import format_bytes, format_duration, format_rate

GRAD_NORM, GRAD_NORM_GROUPS = "grad_norm", "grad_norm by group"
COUNTS = ("targets", "tokens", "captions_dropped", "skipped")  # of a step, on this rank
FIRST_STEPS = 50  # after which a loss above chance is a bad sign
BROKEN_LINES = 3  # lines in a row without a finite loss that end the run
QUIET = 60.0  # seconds without a line, where there is no terminal, after which one says how far the run is
STACKED = 256  # steps whose sums are kept separately before they are added up


@final
class MetricsHook(Hook):
    """Adds numbers up on the device and reads them once per log line, never in between.

    `memory_gb` is the most memory that training took so far, on a GPU without previews. The first line after the first
    step also has, once, what the memory is used for and what checkpoints take. The console leaves out details: losses
    by bucket, gradients' norms by group, dropped captions and tokens per second.

    On a terminal a live line shows the numbers, and of their lines only the first is printed. Elsewhere all are, and if
    there was none for a minute, a line that says how far the run is.

    Args:
        every: optimizer steps between two lines (always steps). The first and the last step have a line as well.
    """

    priority = "ABOVE_NORMAL"

    def __init__(self, every: int = 10) -> None:
        require(every >= 1, f"log interval `every` got {every}; expected at least 1")
        self.every = every

    def _clear(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}  # one per step, on the device: scalars, or by bucket or group
        self._counts: Counter[str | int] = Counter()  # see COUNTS; and targets by bucket
        self._steps = self._samples = 0
        self._waited = self._seconds = 0.0

    def before_train(self, run: Run) -> None:
        self._file = run.work_dir / "metrics.jsonl"
        self._first, self._began = run.clock.done + 1, math.inf
        self._described_memory, self._broken = False, 0
        if distributed.rank() == 0 and self._file.exists():  # drop what a resumed run writes again, and a cut-off line
            lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["iter"] <= run.clock.done]
            write_text(self._file, "".join(kept))
        self._clear()
        self._loss: float | None = None  # of the last line
        self._before = 0, 0.0  # samples of the last line, and their seconds
        if distributed.rank() == 0:
            self._line = run.live_line = LiveLine(lambda: self._progress(run), lambda: self._write_pace(run), QUIET)

    def after_step(self, run: Run, step: Step) -> None:
        self._began = min(self._began, time.perf_counter() - step.seconds["all"])
        for name, value in {**step.sums, GRAD_NORM: step.grad_norm, GRAD_NORM_GROUPS: step.group_norms}.items():
            if value is not None:
                self._sums.setdefault(name, []).append(value)
        self._counts.update({name: getattr(step, name) for name in COUNTS})
        self._counts.update(step.bucket_targets)
        self._steps += 1
        if self._steps % STACKED == 0:
            self._sums = {name: [torch.stack(values).sum(dim=0)] for name, values in self._sums.items()}
        self._samples += step.samples
        self._learning_rate = step.learning_rate
        self._waited += step.seconds["data"]
        self._seconds += step.seconds["all"]
        done = run.clock.done
        if done % self.every == 0 or done == self._first or run.clock.finished:
            self._write_line(run)
        elif distributed.rank() == 0:
            self._line.tick()

    def on_interrupt(self, run: Run) -> None:
        """Write the steps since the last line."""
        if self._steps:
            self._write_line(run)

    def _write_line(self, run: Run) -> None:
        """Read the device, once, and write one line everywhere."""
        metrics, details = self._read(run)
        self._loss, self._before = metrics["loss"], (self._samples, self._samples / metrics["images_per_second"])
        self._clear()
        self._refuse_broken(run, metrics["loss"])
        if distributed.rank() != 0:
            return
        clock, chance = run.clock, run.trainable.chance_loss
        if chance and metrics["loss"] > chance[1] and clock.done >= max(FIRST_STEPS, clock.max_iters // 10):
            loss = f"{metrics['loss']:.3f} after {clock.done} steps, and guessing gives {chance[1]:.3f}"
            run.warn(f"the loss is above chance: {loss} ({chance[0]}); check images and captions, or learn more slowly")
        due = not self._described_memory and clock.done != self._first  # once, when the optimizer has its state
        memory, described = self._memory(run) if due else ({}, "")
        self._described_memory |= due
        printed = clock.done == self._first or not self._line.live
        run.record({**metrics, **details}, self._console(run, metrics), memory, printed)
        self._line.wrote_line()
        if described:
            run.logger.info(described)
        if not math.isfinite(metrics["loss"]):
            run.logger.info(f"the loss is {metrics['loss']}: lower the learning rate, or set precision to bf16 or fp32")

    def _refuse_broken(self, run: Run, loss: float) -> None:
        """Stop at the third line in a row whose loss is no number, on all ranks."""
        self._broken = 0 if math.isfinite(loss) else self._broken + 1
        if self._broken == BROKEN_LINES:
            good = run.checkpoints
            last = f"the last good checkpoint is '{good[-1]}'" if good else "there is no checkpoint yet"
            raise Diverged(
                f"training diverged: the loss is {loss} for {BROKEN_LINES} lines; lower the learning rate; {last}"
            )

    def _read(self, run: Run) -> tuple[dict[str, float], dict[str, float]]:
        """The numbers of the line, and details that the console leaves out."""
        started = time.perf_counter()
        counts = self._counts_of_all_ranks()
        metrics, details = self._means(run, counts)
        seconds = self._seconds + time.perf_counter() - started  # the read waited for what was still running
        metrics |= run.trainable.extra_metrics()
        metrics["lr"] = self._learning_rate
        metrics["images_per_second"] = self._samples / seconds
        metrics["seconds_per_step"] = seconds / self._steps
        metrics["data_wait"] = self._waited / seconds
        metrics["memory_gb"] = run.peak_memory() / 1e9
        if counts["skipped"]:
            metrics["skipped_pictures"] = counts["skipped"]
        if counts["tokens"]:
            details["tokens_per_second"] = counts["tokens"] / seconds
        if run.trainable.caption_lengths([])[1]:  # it reads captions
            details["captions_dropped"] = counts["captions_dropped"] / self._samples
        return metrics, details

    def _counts_of_all_ranks(self) -> dict[str | int, float]:
        """COUNTS and, by number, the targets of each bucket."""
        names = [*COUNTS, *range(max((len(values[0]) for values in self._sums.values() if values[0].ndim), default=0))]
        return dict(zip(names, distributed.add_counts(*(self._counts[name] for name in names))))

    def _means(self, run: Run, counts: dict[str | int, float]) -> tuple[dict[str, float], dict[str, float]]:
        """Sums over all ranks divided by what they are over: scalars, and those by bucket or group by their names."""
        packed = [torch.stack(values).float().sum(dim=0).reshape(-1) for values in self._sums.values()]
        joined = torch.cat(packed)
        if distributed.world_size() > 1:
            dist.all_reduce(joined)
        numbers, steps = iter(joined.tolist()), self._steps * distributed.world_size()  # norms are equal on all ranks
        metrics: dict[str, float] = {}
        details: dict[str, float] = {}
        for name, values in self._sums.items():
            if name == GRAD_NORM:
                metrics[name] = next(numbers) / steps
            elif name == GRAD_NORM_GROUPS:
                details |= {f"{GRAD_NORM}_{group}": next(numbers) / steps for group in run.optim_wrapper.groups}
            elif values[0].ndim == 0:
                metrics[name] = next(numbers) / counts["targets"]
            else:
                means = [(f"{name}{bucket}", next(numbers), counts[bucket]) for bucket in range(len(values[0]))]
                details |= {key: total / count for key, total, count in means if count}
        return metrics, details

    def _memory(self, run: Run) -> tuple[dict[str, float], str]:
        """What memory is used for and what a checkpoint takes: GB by metric, and a line for the console."""
        held = run.memory()
        sizes = {"weights": held["trained"] + held["frozen"]} | {key: held[key] for key in ("gradients", "optimizer")}
        if held["average"]:
            sizes["average"] = held["average"]
        if torch.cuda.is_available():  # the peak of a process includes too much else
            sizes["activations"] = max(0, run.peak_memory() - sum(held.values()))
        numbers = {f"memory_{name}_gb": size / 1e9 for name, size in sizes.items()}
        text = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
        if run.checkpoints_kept:
            size = run.checkpoint_bytes()
            numbers["checkpoint_gb"] = size / 1e9
            text += f"; on disk {run.checkpoints_kept} x {format_bytes(size)} of checkpoints at a time"
        return numbers, f"memory: {text}; {self._left(run)} left"

    def _left(self, run: Run) -> str:
        """The time to the end, previews included."""
        per_step = (time.perf_counter() - self._began) / (run.clock.done - self._first + 1)
        return format_duration(per_step * (run.clock.max_iters - run.clock.done))

    def _pace(self, run: Run) -> list[str]:
        """The time to the end, and images per second since the line before the last one; the device is not read."""
        samples, seconds = self._before[0] + self._samples, self._before[1] + self._seconds
        return [f"{self._left(run)} left", f"{format_rate(samples / seconds)} images/s"] if samples else []

    def _progress(self, run: Run) -> Progressed:
        """What the live line shows."""
        clock, held_out, preview = run.clock, run.validation[1].get("val/loss"), run.next_preview
        numbers = [f"{clock.done}/{clock.max_iters}"]
        if self._loss is not None:
            numbers.append(f"loss {self._loss:.4g}")
        if held_out is not None:
            numbers.append(f"val {held_out:.4g}")
        numbers += self._pace(run)
        if preview is not None and preview > clock.done:
            numbers.append(f"preview in {preview - clock.done}")
        return clock.done / clock.max_iters, numbers

    def _write_pace(self, run: Run) -> None:
        run.logger.info("  ".join([f"step {run.clock.done}/{run.clock.max_iters}", *self._pace(run)]))

    def _console(self, run: Run, metrics: dict[str, float]) -> str:
        clock, chance = run.clock, run.trainable.chance_loss
        reference = f" ({chance[0]} = {chance[1]:.3f})" if chance and clock.done == self._first else ""
        shown = {"loss", "lr", "images_per_second", "seconds_per_step", "data_wait", "memory_gb"}
        extra = "".join(f"  {name} {value:.4g}" for name, value in metrics.items() if name not in shown)
        epoch = f"epoch {clock.epochs_done}/{clock.max_epochs}  " if clock.by_epoch else ""
        return (
            f"{epoch}step {clock.done}/{clock.max_iters}  loss {metrics['loss']:.4f}{reference}{extra}  "
            f"lr {metrics['lr']:.2e}  {format_rate(metrics['images_per_second'])} images/s  "
            f"data wait {metrics['data_wait']:.0%}  memory {metrics['memory_gb']:.2f} GB  {self._left(run)} left"
        )
