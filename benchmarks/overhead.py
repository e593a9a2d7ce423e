"""Microseconds that an iteration of our loop takes over a bare PyTorch loop's, and its host waits.

    python -m benchmarks.overhead --pairs 2000

One process trains one small model in turns: an iteration of ours, then one of a loop as anyone would write it
(next batch, forward, backward, clipping, optimizer step), over the same batches of cached tokens. Both make
the same calls into the data loader, the model, autograd and the optimizer, and those take milliseconds that
differ by more than what is looked for. So what is compared is the time outside of them: all that a loop does
of its own. Those calls leave little of a loop's code in the processor's caches, so what it does next is
slow; the column "warm" is both loops alone, with each call giving at once what it gave the first time. Torch
runs on one thread.

Far into a run, the loop starts with its counters there; first and last quarter show what grows within a run.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from mmengine.hooks import Hook

from benchmarks import common
from diffengine.datasets import PositionSampler, make_loader
from diffengine.engine.run import Run
from tests.engine.test_metrics import Close, CountReads
from tests.support import models, photos


class Clock:
    """Laps of a loop, and how much of each is outside of the calls that every loop makes.

    Attributes:
        laps, outside: seconds, by iteration.
        hollow: of all clocks: a call that was made before gives what it gave then.
    """

    hollow = False
    _inside = 0.0  # of all clocks: seconds in calls so far in this lap

    def __init__(self) -> None:
        self.laps: list[float] = []
        self.outside: list[float] = []

    def start(self) -> None:
        Clock._inside = 0.0
        self._since = time.perf_counter()

    def stop(self) -> None:
        seconds = time.perf_counter() - self._since
        self.laps.append(seconds)
        self.outside.append(seconds - Clock._inside)

    @staticmethod
    def call(function: Callable) -> Callable:
        """The function, timed; on a GPU with what it started there."""
        kept: list[Any] = []  # only where it is given again: a graph is freed where its loop lets go of it

        @wraps(function)  # so that a schedule sees that it comes after the optimizer's steps
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                if kept:
                    return kept[0]
                result = function(*arguments, **options)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if Clock.hollow:
                    kept.append(result)
                return result
            finally:
                Clock._inside += time.perf_counter() - began

        return timed


class TimedBatches:
    """A loader whose batches are waited for inside of a call."""

    def __init__(self, loader: Iterable) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator:
        fetch = Clock.call(iter(self._loader).__next__)
        while True:
            try:
                yield fetch()
            except StopIteration:
                return


class Turns(Hook):
    """After each iteration of ours, one of the bare loop."""

    priority = "LOWEST"

    def __init__(self, start: int) -> None:
        self.start = start
        self.ours, self.bare = Clock(), Clock()

    def before_train(self, runner: Any) -> None:
        loop, model, optimizer = runner.train_loop, runner.trainable, runner.optim_wrapper.optimizer
        for owner, names in ((model, ("prepare", "forward")), (optimizer, ("step", "zero_grad"))):
            for name in names:
                setattr(owner, name, Clock.call(getattr(owner, name)))
        sampler = PositionSampler(loop.batch_size, start_step=self.start)
        self._bare = bare_loop(runner, TimedBatches(make_loader(loop.stream, sampler)))
        loop.dataloader = TimedBatches(loop.dataloader)
        self.ours.start()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.ours.stop()
        self.bare.start()
        next(self._bare)
        self.bare.stop()
        self.ours.start()


def bare_loop(runner: Run, loader: Iterable) -> Iterator[None]:
    """A plain training loop over the run's own model and optimizer; stops after each step."""
    model, optimizer = runner.trainable, runner.optim_wrapper.optimizer
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for batch in loader:
        loss, _ = model(model.prepare(batch))
        (loss / sum(batch["num_targets"])).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


# As small as the class allows: what is looked for are microseconds, and noise grows with what they hide in.
SMALLEST = {
    "hidden_size": 16, "in_channels": 16, "block_out_channels": 16, "num_res_blocks": 1, "block_num_heads": 1,
    "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16, "micro_cond_encode_dim": 8,
    "sample_size": 8,
}  # fmt: skip


def build(root: Path, start: int, steps: int) -> Run:
    """A run of so many steps of one image each that has taken `start` before."""
    run = common.build(
        "amused_512_own",
        root / f"run-{start}",
        [*common.STEPS_ONLY, *common.tokens("cached", root / "cache"), "resolution=32", "batch_size=1",
         f"model.transformer={SMALLEST}",
         "num_workers=0", "precision=fp32", f"max_iters={start + steps}", f"log_every={start + steps + 1}"],
        {"data": str(root / "data"), "pretrained": str(root / "model")},
    )  # fmt: skip
    run.train_loop.start_at(start)
    run.train_loop.dataloader.batch_sampler.start_step = start
    return run


def compare(root: Path, start: int, count: int, hollow: bool) -> tuple[Clock, Clock]:
    """So many of the bare loop's iterations, and ours beside them."""
    turns = Turns(start)
    runner = build(root, start, count)
    runner.register_hook(turns)
    with ExitStack() as stack:
        stack.enter_context(patch.object(Clock, "hollow", hollow))
        for owner, name in ((torch.autograd, "backward"), (torch.nn.utils, "clip_grad_norm_")):
            stack.enter_context(patch.object(owner, name, Clock.call(getattr(owner, name))))
        runner.train()
    return turns.bare, turns.ours


def count_waits(root: Path, start: int, steps: int) -> float:
    """Host waits per iteration, of those that write no log line (the first and the last do)."""
    runner = build(root, start, steps)
    counter = CountReads()
    runner.register_hook(counter)
    runner.register_hook(Close(counter))
    runner.train()
    between = list(counter.by_step.values())[1:-1]
    return sum(waits.total() for waits in between) / len(between)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=2000, help="iterations of each loop that are timed")
    parser.add_argument("--start", nargs="+", type=int, default=[0, 10_000, 1_000_000])
    parser.add_argument("--warm-up", type=int, default=50, help="pairs that are not counted")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{options.pairs} pairs of iterations on {common.machine()}, one thread\n")
    table = common.Table(
        "from iteration", "bare us", "of its own", "ours us", "of its own", "over us", "first quarter",
        "last quarter", "warm", "host waits",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models.make_model_folder(root / "model", "toy")
        photos.write_photo_folder(root / "data", 9, 32)
        for start in options.start:
            with common.aside():
                sides = [compare(root, start, options.warm_up + options.pairs, hollow) for hollow in (False, True)]
                waits = count_waits(root, start, 5)
            counted = slice(options.warm_up, None)
            bare, ours = sides[0]
            over, warm = (
                [mine - plain for mine, plain in zip(ours.outside[counted], bare.outside[counted])]
                for bare, ours in sides
            )
            quarter = max(1, len(over) // 4)
            columns = (
                bare.laps[counted], bare.outside[counted], ours.laps[counted], ours.outside[counted],
                over, over[:quarter], over[-quarter:], warm,
            )  # fmt: skip
            micros = [statistics.median(some) for some in columns]
            table.row(f"{start:,}", *[f"{1e6 * value:.0f}" for value in micros], f"{waits:g}")


if __name__ == "__main__":
    main()
