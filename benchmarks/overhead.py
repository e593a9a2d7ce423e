"""Overhead of our training loop over a bare PyTorch loop, in microseconds per iteration, and host syncs.

    python -m benchmarks.overhead --pairs 2000

One process trains one small model with both loops, which take turns: one iteration of our loop, then one of a bare loop
(next batch, forward, backward, clipping, optimizer step), on the same batches of cached tokens. Both make the same
calls into the data loader, the model, autograd and the optimizer. These calls take milliseconds, and their noise is
larger than the overhead. So the benchmark compares only the time outside these calls. Torch runs on one thread.

The calls evict most of a loop's code and data from the CPU caches, which slows down what the loop does next. For the
column "overhead, warm", each call returns its first result immediately, so only the loops themselves run.

With `--start`, the loop's counters begin at that iteration. The columns for the first and last quarter show whether the
overhead grows within a run.
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
from diffengine.engine import optim
from diffengine.engine.run import Run
from tests.engine.test_metrics import Close, CountReads
from tests.support import models, photos


class Clock:
    """Times the iterations of a loop, and the time outside the calls that both loops make.

    Attributes:
        total: seconds per iteration.
        outside: seconds per iteration outside these calls.
        replay: for all clocks: a repeated call returns its first result.
    """

    replay = False
    _inside = 0.0  # for all clocks: seconds spent in these calls in the current iteration

    def __init__(self) -> None:
        self.total: list[float] = []
        self.outside: list[float] = []

    def start(self) -> None:
        Clock._inside = 0.0
        self._since = time.perf_counter()

    def stop(self) -> None:
        seconds = time.perf_counter() - self._since
        self.total.append(seconds)
        self.outside.append(seconds - Clock._inside)

    @staticmethod
    def timed(function: Callable) -> Callable:
        """Wrap a function to time its calls; on a GPU, until its kernels have finished."""
        first: list[Any] = []  # filled only for replay: keeping a result also keeps its autograd graph in memory

        @wraps(function)  # the scheduler checks that the optimizer has stepped before it
        def wrapper(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                if first:
                    return first[0]
                result = function(*arguments, **options)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if Clock.replay:
                    first.append(result)
                return result
            finally:
                Clock._inside += time.perf_counter() - began

        return wrapper


class TimedBatches:
    """A data loader with a timed call for each batch."""

    def __init__(self, loader: Iterable) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator:
        fetch = Clock.timed(iter(self._loader).__next__)
        while True:
            try:
                yield fetch()
            except StopIteration:
                return


class AlternateHook(Hook):
    """Runs one iteration of the bare loop after each of ours."""

    priority = "LOWEST"

    def __init__(self, start: int) -> None:
        self.start = start
        self.ours, self.bare = Clock(), Clock()

    def before_train(self, runner: Any) -> None:
        loop, model, optimizer = runner.train_loop, runner.trainable, runner.optim_wrapper.optimizer
        for owner, names in ((model, ("prepare", "forward")), (optimizer, ("step", "zero_grad"))):
            for name in names:
                setattr(owner, name, Clock.timed(getattr(owner, name)))
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
    """A plain training loop with the run's model and optimizer; yields after each step."""
    model, optimizer = runner.trainable, runner.optim_wrapper.optimizer
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for batch in loader:
        loss, _ = model(model.prepare(batch))
        (loss / sum(batch["num_targets"])).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


# The smallest model that the class allows, since a larger one adds noise to the measurement.
SMALLEST = {
    "hidden_size": 16, "in_channels": 16, "block_out_channels": 16, "num_res_blocks": 1, "block_num_heads": 1,
    "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16, "micro_cond_encode_dim": 8,
    "sample_size": 8,
}  # fmt: skip


def build(root: Path, start: int, steps: int) -> Run:
    """Build a run that continues after `start` steps and takes `steps` more, of one image each."""
    run = common.build(
        "amused_512_own",
        root / f"run-{start}",
        [*common.STEPS_ONLY, *common.token_options("cached", root / "cache"), "resolution=32", "batch_size=1",
         f"model.transformer={SMALLEST}",
         "num_workers=0", "precision=fp32", f"max_iters={start + steps}", f"log_every={start + steps + 1}"],
        {"data": str(root / "data"), "pretrained": str(root / "model")},
    )  # fmt: skip
    run.train_loop.start_at(start)
    run.train_loop.dataloader.batch_sampler.start_step = start
    return run


def compare(root: Path, start: int, count: int, replay: bool) -> tuple[Clock, Clock]:
    """Run `count` iterations of each loop in turns."""
    hook = AlternateHook(start)
    runner = build(root, start, count)
    runner.register_hook(hook)
    with ExitStack() as stack:
        stack.enter_context(patch.object(Clock, "replay", replay))
        for owner, name in ((torch.autograd, "backward"), (torch.nn.utils, "clip_grad_norm_"), (optim, "clip")):
            stack.enter_context(patch.object(owner, name, Clock.timed(getattr(owner, name))))
        runner.train()
    return hook.bare, hook.ours


def count_syncs(root: Path, start: int, steps: int) -> float:
    """Host syncs per iteration, over the iterations that log nothing (the first and the last one log)."""
    runner = build(root, start, steps)
    counter = CountReads()
    runner.register_hook(counter)
    runner.register_hook(Close(counter))
    runner.train()
    between = list(counter.by_step.values())[1:-1]
    return sum(syncs.total() for syncs in between) / len(between)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=2000, help="timed iterations of each loop")
    parser.add_argument("--start", nargs="+", type=int, default=[0, 10_000, 1_000_000], help="iterations to start from")
    parser.add_argument("--warm-up", type=int, default=50, help="untimed iterations of each loop at the start")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{options.pairs} pairs of iterations on {common.machine()}, one thread\n")
    table = common.Table(
        "start iteration", "bare us", "bare, outside calls", "ours us", "ours, outside calls", "overhead us",
        "overhead, first quarter", "overhead, last quarter", "overhead, warm", "host syncs",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models.make_model_folder(root / "model", "toy")
        photos.write_photo_folder(root / "data", 9, 32)
        for start in options.start:
            with common.stdout_to_stderr():
                sides = [compare(root, start, options.warm_up + options.pairs, replay) for replay in (False, True)]
                syncs = count_syncs(root, start, 5)
            timed = slice(options.warm_up, None)
            bare, ours = sides[0]
            overhead, warm = (
                [seconds - base for seconds, base in zip(ours.outside[timed], bare.outside[timed])]
                for bare, ours in sides
            )
            quarter = max(1, len(overhead) // 4)
            columns = (
                bare.total[timed], bare.outside[timed], ours.total[timed], ours.outside[timed],
                overhead, overhead[:quarter], overhead[-quarter:], warm,
            )  # fmt: skip
            micros = [statistics.median(column) for column in columns]
            table.row(f"{start:,}", *[f"{1e6 * value:.0f}" for value in micros], f"{syncs:g}")


if __name__ == "__main__":
    main()
