"""Numbers of the run: to the console, to `metrics.jsonl` and to the visualizer's backends."""

import json
import math
import time
from typing import final

import torch

from diffengine import distributed
from diffengine.datasets.findings import listed
from diffengine.engine import checkpoint
from diffengine.engine.mmengine_seam import Hook
from diffengine.engine.run import Run
from diffengine.engine.step import BY_SOURCE, GRAD_NORM, GRAD_NORM_GROUPS, Step, Totals, Window
from diffengine.errors import Diverged, require
from diffengine.files import write_text
from diffengine.terminal import LiveLine, Progressed
from diffengine.text import format_bytes, format_duration, format_rate

FIRST_STEPS = 50  # after which a loss above chance is a bad sign
MOST_NAMED = 20  # images that were skipped, in one line
NAMED = 8  # images of a bad step that are named
QUIET = 60.0  # seconds without a line, where there is no terminal, after which one says how far the run is


@final
class MetricsHook(Hook):
    """Adds numbers up on the device and reads them once per log line, never in between.

    `memory_gb` is the most memory that training took so far, on a GPU without previews. The first line after the first
    step also has, once, what the memory is used for and what checkpoints take. The console leaves out details: losses
    by bucket and by source, gradients' norms by group, dropped captions and tokens per second. Losses and norms are
    means over the steps that were not bad; a line with bad ones has their number as `bad_steps`.

    On a terminal a live line shows the numbers, and of their lines only the first is printed. Elsewhere all are, and if
    there was none for a minute, a line that says how far the run is.

    Args:
        every: optimizer steps between two lines (always steps). The first and the last step have a line as well.
        max_bad_steps: so many bad steps in a row, whose loss or gradients are not finite, end the run at the next line.
    """

    priority = "ABOVE_NORMAL"

    def __init__(self, every: int = 10, max_bad_steps: int = 20) -> None:
        require(every >= 1, f"log interval `every` got {every}; expected at least 1")
        require(max_bad_steps >= 1, f"max_bad_steps got {max_bad_steps}; expected at least 1")
        self.every, self.max_bad_steps = every, max_bad_steps

        self._window: Window | None = None

    def after_load_checkpoint(self, run: Run, checkpoint: dict) -> None:
        if "metrics" in checkpoint:
            self._window = Window(run.job.device)
            self._window.restore(checkpoint["metrics"])

    def before_save_checkpoint(self, run: Run, checkpoint: dict) -> None:
        """Keep the steps since the last line, so that a resumed run writes the lines of one that never stopped."""
        if self._window is not None:
            checkpoint["metrics"] = self._window.state()

    def before_train(self, run: Run) -> None:
        self._file = run.work_dir / "metrics.jsonl"
        self._first, self._began = run.clock.done + 1, math.inf
        self._described_memory = False
        if distributed.rank() == 0 and self._file.exists():  # drop what a resumed run writes again
            kept = [line for line in run.metrics if line["iter"] <= run.clock.done]
            write_text(self._file, "".join(json.dumps(line) + "\n" for line in kept))
            self._described_memory = any("memory_weights_gb" in line for line in kept)
        if self._window is None:
            self._window = Window(run.job.device)
        self._skipped: list[str] = []  # of this rank since the last line that names them
        self._named: set[str] = set()
        self._loss: float | None = None  # of the last line
        self._before = 0, 0.0  # samples of the last line, and their seconds
        if distributed.rank() == 0:
            self._line = run.live_line = LiveLine(lambda: self._progress(run), lambda: self._write_pace(run), QUIET)

    def after_step(self, run: Run, step: Step) -> None:
        assert self._window is not None
        self._began = min(self._began, time.perf_counter() - step.seconds["all"])
        self._window.add(step)
        self._skipped += step.skipped_names
        self._learning_rate = step.learning_rate
        done = run.clock.done
        if done % self.every == 0 or done == 1 or run.clock.finished:
            self._write_line(run, self._window)
        elif distributed.rank() == 0:
            self._line.tick()

    def _write_line(self, run: Run, window: Window) -> None:
        """Read the device, once, and write one line everywhere."""
        metrics, details, bad = self._read(run, window)
        if metrics.get("skipped_pictures"):
            self._name_skipped(run)
        samples, is_first = len(window) * run.clock.batch_size, self._loss is None
        self._loss, self._before = metrics["loss"], (samples, samples / metrics["images_per_second"])
        window.clear()
        if distributed.rank() == 0:
            self._record(run, metrics, details, is_first)
        self._judge(run, window, bad)

    def _name_skipped(self, run: Run) -> None:
        """Log each image that was skipped, once; on every rank, all of which know whether any was."""
        names = dict.fromkeys(name for names in distributed.gathered(self._skipped) for name in names)
        self._skipped = []
        new = [name for name in names if name not in self._named]
        self._named |= set(new)
        if new:
            run.logger.info(f"skipped what cannot be read: {listed(new, MOST_NAMED)}; {len(self._named)} so far")

    def _record(self, run: Run, metrics: dict[str, float], details: dict[str, float], is_first: bool) -> None:
        """Write a line everywhere; `is_first`: of this process."""
        clock, chance = run.clock, run.trainable.chance_loss
        if chance and metrics["loss"] > chance[1] and clock.done >= max(FIRST_STEPS, clock.max_iters // 10):
            loss = f"{metrics['loss']:.3f} after {clock.done} steps, and guessing gives {chance[1]:.3f}"
            run.warn(f"the loss is above chance: {loss} ({chance[0]}); check images and captions, or learn more slowly")
        due = not self._described_memory and clock.done > 1  # once, when the optimizer has its state
        memory, described = self._memory(run) if due else ({}, "")
        self._described_memory |= due
        text = self._console(run, metrics, f" ({chance[0]} = {chance[1]:.3f})" if chance and is_first else "")
        run.record({**metrics, **details}, text, memory, is_first or not self._line.live)
        self._line.wrote_line()
        if described:
            run.logger.info(described)

    def _judge(self, run: Run, window: Window, bad: list[bool]) -> None:
        """Warn of the first bad step, and stop after too many in a row, on all ranks; `bad` has the line's steps."""
        scaled = run.optim_wrapper.scaler.is_enabled()
        advice = "lower the learning rate, or check these images" + scaled * ", or set precision to bf16 or fp32"
        for step, is_bad in enumerate(bad, start=run.clock.done - len(bad)):  # from 0
            window.bad_in_a_row = window.bad_in_a_row + 1 if is_bad else 0
            if window.bad_in_a_row == 1 and not scaled:  # the loss scaler of fp16 finds its scale by bad steps
                run.warn(
                    f"bad steps are skipped: loss or gradients of {self._describe(run, step)} are not finite; {advice}"
                )
            if window.bad_in_a_row == self.max_bad_steps:
                first = step + 1 - self.max_bad_steps
                good = [path for path in run.checkpoints if checkpoint.steps(path) <= first]
                last = f"the last good checkpoint is '{good[-1]}'" if good else "there is no checkpoint yet"
                raise Diverged(
                    f"training diverged: loss or gradients of {self.max_bad_steps} steps in a row are not finite, the "
                    f"first is {self._describe(run, first)}; {advice}; {last}"
                )

    def _describe(self, run: Run, step: int) -> str:
        """A step (from 0) and its samples."""
        loop, first = run.train_loop, step * run.clock.batch_size
        positions = range(first, first + run.clock.batch_size)
        images = [loop.stream.dataset.name(loop.stream.locate(position)[1]) for position in positions[:NAMED]]
        more = f" and {len(positions) - NAMED} more" if len(positions) > NAMED else ""
        return f"step {step + 1} (positions {positions[0]} to {positions[-1]}: {', '.join(images)}{more})"

    def _read(self, run: Run, window: Window) -> tuple[dict[str, float], dict[str, float], list[bool]]:
        """The numbers of the line, details that the console leaves out, and which steps were bad."""
        started = time.perf_counter()
        totals = window.read()
        counts = totals.counts
        seconds = window.seconds + time.perf_counter() - started  # the read waited for what was still running
        metrics, details = self._means(run, totals)
        images = len(window) * run.clock.batch_size
        metrics |= run.trainable.extra_metrics()
        metrics["lr"] = self._learning_rate
        metrics["images_per_second"] = images / seconds
        metrics["seconds_per_step"] = seconds / len(window)
        metrics["data_wait"] = window.waited / seconds
        metrics["memory_gb"] = run.peak_memory() / 1e9
        if counts["skipped"]:
            metrics["skipped_pictures"] = counts["skipped"]
        if any(totals.bad):
            metrics["bad_steps"] = sum(totals.bad)
        if counts["tokens"]:
            details["tokens_per_second"] = counts["tokens"] / seconds
        if run.trainable.caption_lengths([])[1]:  # it reads captions
            details["captions_dropped"] = counts["captions_dropped"] / images
        return metrics, details, totals.bad

    def _means(self, run: Run, totals: Totals) -> tuple[dict[str, float], dict[str, float]]:
        """Losses and norms: scalars, and those by bucket, source or group by name. Without a good step they are NaN."""
        metrics: dict[str, float] = {}
        details: dict[str, float] = {}
        for name, values in totals.sums.items():
            if name == BY_SOURCE:
                triples = zip(run.train_loop.stream.sources, values, totals.source_targets)
                details |= {f"loss/{source.name}": value / count for source, value, count in triples if count}
            elif len(values) == 1:
                metrics[name] = values[0] / (totals.counts["targets"] or math.nan)
            else:
                pairs = enumerate(zip(values, totals.bucket_targets))
                details |= {f"{name}{bucket}": value / count for bucket, (value, count) in pairs if count}
        (metrics[GRAD_NORM],) = totals.norms[GRAD_NORM]
        if groups := totals.norms.get(GRAD_NORM_GROUPS):
            details |= {f"{GRAD_NORM}_{group}": norm for group, norm in zip(run.optim_wrapper.groups, groups)}
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
        assert self._window is not None
        samples = self._before[0] + len(self._window) * run.clock.batch_size
        seconds = self._before[1] + self._window.seconds
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

    def _console(self, run: Run, metrics: dict[str, float], reference: str) -> str:
        clock = run.clock
        shown = {"loss", "lr", "images_per_second", "seconds_per_step", "data_wait", "memory_gb"}
        extra = "".join(f"  {name} {value:.4g}" for name, value in metrics.items() if name not in shown)
        epoch = f"epoch {clock.epochs_done}/{clock.max_epochs}  " if clock.by_epoch else ""
        return (
            f"{epoch}step {clock.done}/{clock.max_iters}  loss {metrics['loss']:.4f}{reference}{extra}  "
            f"lr {metrics['lr']:.2e}  {format_rate(metrics['images_per_second'])} images/s  "
            f"data wait {metrics['data_wait']:.0%}  memory {metrics['memory_gb']:.2f} GB  {self._left(run)} left"
        )
