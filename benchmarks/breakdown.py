"""Time per phase of a training step.

    python -m benchmarks.breakdown --size tiny mid --resolution 256 512 --batch 1 8

Phases of a step:

- data: waiting for the batch, which the workers read in parallel
- VQ: encoding images to tokens
- text: tokenizing captions and running the text encoder
- forward: the transformer without its token head
- head: the token head on masked positions, and the loss
- backward: the backward pass
- optimizer: gradient clipping and the optimizer step
- other: everything else, such as lookups in the caption cache

On a GPU the clock synchronizes after each phase, so phases that overlap in training do not overlap here.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook

from benchmarks import common
from diffengine.engine.run import Run

MODES = ("online", "cached")
PHASES = ("data", "VQ", "text", "forward", "head", "backward", "optimizer", "other")


class Clock:
    """Adds up seconds per phase. While a nested phase runs, the outer one is paused."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._active = ["other"]
        self._since = 0.0

    def enter(self, phase: str) -> None:
        self._charge()
        self._active.append(phase)

    def leave(self) -> None:
        self._charge()
        self._active.pop()

    def _charge(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds[self._active[-1]] += now - self._since
        self._since = now

    def restart(self) -> dict[str, float]:
        """The seconds since the last call."""
        self._charge()
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds

    def wrap(self, owner: Any, method: str, phase: str) -> None:
        """Count the time of an object's method as this phase."""
        inner: Callable = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            self.enter(phase)
            try:
                return inner(*arguments, **options)
            finally:
                self.leave()

        setattr(owner, method, timed)


class PhaseHook(Hook):
    """Records the seconds per phase of each step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.steps: list[dict[str, float]] = []

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.clock.restart()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.steps.append({**self.clock.restart(), "data": outputs.seconds["data"]})


def time_phases(runner: Run) -> PhaseHook:
    """Time the phases of a run that trains an AmusedModel."""
    clock, model, optim = Clock(), runner.trainable, runner.optim_wrapper
    transformer = model.module("transformer")
    for owner, method, phase in [
        (model.preprocessor, "encode", "VQ"),
        (model.preprocessor, "text_ids", "text"),
        (model, "encode_text", "text"),
        (model, "forward", "head"),  # what remains is the loss
        (transformer, "forward", "forward"),
        (transformer.mlm_layer, "forward", "head"),
        (optim, "backward", "backward"),
        (optim, "step", "optimizer"),
    ]:
        clock.wrap(owner, method, phase)
    hook = PhaseHook(clock)
    runner.register_hook(hook, priority="VERY_HIGH")
    return hook


def measure(model: Path, data: Path, work_dir: Path, resolution: int, settings: list[str]) -> list[dict[str, float]]:
    """Seconds per phase, for each step."""
    inputs = {"data": str(data), "pretrained": str(model)}
    options = [*common.STEPS_ONLY, "log_every=1000", *settings]
    run = common.build(f"amused_{resolution}_own", work_dir, options, inputs)
    hook = time_phases(run)
    run.train()
    return hook.steps


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--size", nargs="+", choices=common.SIZES, default=["tiny"])
    parser.add_argument("--resolution", nargs="+", type=int, choices=(256, 512), default=[512])
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="images per step")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--warm-up", type=int, default=3, help="untimed steps at the start")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--workers", type=int, default=2, help="data loader workers")
    parser.add_argument("--cfg-options", nargs="+", default=[], help="for example precision=bf16 compile=True")
    options = parser.parse_args(arguments)
    count = options.warm_up + options.steps
    settings = [f"num_workers={options.workers}", f"max_iters={count}", *options.cfg_options]
    print(f"milliseconds per step on {common.machine()}, medians of {options.steps} steps\n")
    table = common.Table("size", "px", "batch", "mode", *PHASES, "total")
    with tempfile.TemporaryDirectory() as root:
        data = common.write_images(Path(root) / "data", count * max(options.batch))
        for size, resolution in itertools.product(options.size, options.resolution):
            model = common.make_model(Path(root) / f"{size}-{resolution}", size, resolution)
            for batch, mode in itertools.product(options.batch, options.modes):
                with tempfile.TemporaryDirectory(dir=root) as scratch, common.stdout_to_stderr():
                    tokens = common.token_options(mode, Path(scratch) / "cache")
                    steps = measure(
                        model, data, Path(scratch) / "run", resolution,
                        [f"batch_size={batch}", *tokens, *settings],
                    )[options.warm_up :]  # fmt: skip
                seconds = [statistics.median(step[phase] for step in steps) for phase in PHASES]
                seconds.append(statistics.median(sum(step.values()) for step in steps))
                table.row(size, resolution, batch, mode, *[f"{1e3 * value:.3g}" for value in seconds])


if __name__ == "__main__":
    main()
