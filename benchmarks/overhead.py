"""Microseconds that an iteration of our loop takes over a bare PyTorch loop's, and its host waits.

    python -m benchmarks.overhead --pairs 2000

One process trains one small model in turns: some iterations of ours, then as many of a loop as anyone would
write it (next batch, forward, backward, clipping, optimizer step), over the same batches of cached tokens.
What is shown is the middle of the differences of such turns' middles, so other work on the machine hits both
alike; turns of one iteration would show how long each loop's code takes to come back into the processor's
caches, which no run does. Torch runs on one thread.

Far into a run, the loop starts with its counters there; first and last quarter show what grows within a run.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook

from benchmarks import common
from diffengine import config
from diffengine.datasets import PositionSampler, make_loader
from diffengine.engine.assemble import build_run
from diffengine.engine.runner import Runner
from diffengine.engine.workdir import claim, release
from tests.engine.test_metrics import Close, CountReads
from tests.support import models, pictures


def wait() -> None:
    """For the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


TURN = 25  # iterations


class Turns(Hook):
    """After each turn of ours, one of the bare loop; all iterations are timed.

    Attributes:
        ours, bare: seconds, by iteration.
    """

    priority = "LOWEST"

    def __init__(self, start: int) -> None:
        self.start = start
        self.ours: list[float] = []
        self.bare: list[float] = []

    def before_train(self, runner: Any) -> None:
        sampler = PositionSampler(runner.train_loop.batch_size, start_step=self.start)
        self._bare = bare_loop(runner, make_loader(runner.train_loop.stream, sampler))
        self._since = time.perf_counter()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self.ours.append(self._lap())
        if len(self.ours) % TURN == 0:
            for _ in range(TURN):
                next(self._bare)
                self.bare.append(self._lap())

    def _lap(self) -> float:
        wait()
        since, self._since = self._since, time.perf_counter()
        return self._since - since


def bare_loop(runner: Runner, loader: Any) -> Iterator[None]:
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


def build(root: Path, start: int, steps: int) -> Runner:
    """A run of so many steps of one picture each that has taken `start` before."""
    settings, resolved = config.load(
        "amused_512_own",
        [*common.STEPS_ONLY, *common.tokens("cached", root / "cache"), "resolution=32", "batch_size=1",
         f"model.transformer={SMALLEST}",
         "num_workers=0", "precision=fp32", f"max_iters={start + steps}", f"log_every={start + steps + 1}"],
        {"data": str(root / "data"), "pretrained": str(root / "model")},
    )  # fmt: skip
    work_dir = root / f"run-{start}"
    claim(work_dir, None, True)
    runner = build_run(settings, resolved, "overhead", work_dir, common.DEVICE)
    runner.train_loop.start_at(start)
    runner.train_loop.dataloader.batch_sampler.start_step = start
    return runner


def compare(
    root: Path, start: int, options: argparse.Namespace
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of the bare turns' iterations, of ours beside them, and what ours took more."""
    turns = Turns(start)
    runner = build(root, start, TURN * (options.warm_up + options.pairs))
    runner.register_hook(turns)
    runner.train()
    bare, ours = (
        [statistics.median(side[first + 1 : first + TURN]) for first in range(0, len(side), TURN)][
            options.warm_up :
        ]
        for side in (turns.bare, turns.ours)
    )
    return bare, ours, [mine - plain for mine, plain in zip(ours, bare)]


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
    parser.add_argument("--pairs", type=int, default=80, help=f"turns of {TURN} iterations that are timed")
    parser.add_argument("--start", nargs="+", type=int, default=[0, 10_000, 1_000_000])
    parser.add_argument("--warm-up", type=int, default=2, help="turns that are not counted")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{options.pairs} pairs of turns of {TURN} iterations on {common.machine()}\n")
    table = common.Table(
        "from iteration", "bare us", "ours us", "over us", "first quarter", "last quarter", "host waits"
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models.make_model_folder(root / "model", "toy")
        pictures.write_photo_folder(root / "data", 9, 32)
        for start in options.start:
            with common.aside():
                bare, ours, over = compare(root, start, options)
                waits = count_waits(root, start, 5)
            quarter = max(1, len(over) // 4)
            micros = [statistics.median(some) for some in (bare, ours, over, over[:quarter], over[-quarter:])]
            table.row(f"{start:,}", *[f"{1e6 * value:.0f}" for value in micros], f"{waits:g}")
        release()


if __name__ == "__main__":
    main()
