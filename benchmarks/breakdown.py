"""Where the time of a step goes.

    python -m benchmarks.breakdown --size tiny mid --resolution 256 512 --batch 1 8

data: the wait for a batch (workers read it meanwhile). VQ: images to tokens. text: captions to ids and
through the text encoder. forward: the transformer without its token head. head: the token head on masked
positions, and the loss. optimizer: with the clipping of gradients. rest: all else, such as what is looked up
in the cache of captions.

On a GPU each part is waited for, so parts that overlap in training are slower here than they are there.
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

WAYS = ("online", "cached")
PARTS = ("data", "VQ", "text", "forward", "head", "backward", "optimizer", "rest")


class Clock:
    """Adds up seconds by part. A part within a part is not counted twice: the outer one's clock stands."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._open = ["rest"]
        self._since = 0.0

    def enter(self, part: str) -> None:
        self._charge()
        self._open.append(part)

    def leave(self) -> None:
        self._charge()
        self._open.pop()

    def _charge(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now

    def restart(self) -> dict[str, float]:
        """What has been added up since the last call."""
        self._charge()
        seconds, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return seconds

    def around(self, owner: Any, method: str, part: str) -> None:
        """Count what a method of an object takes."""
        inner: Callable = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            self.enter(part)
            try:
                return inner(*arguments, **options)
            finally:
                self.leave()

        setattr(owner, method, timed)


class Watch(Hook):
    """The parts of each step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.steps: list[dict[str, float]] = []

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.clock.restart()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.steps.append({**self.clock.restart(), "data": outputs.seconds["data"]})


def watch(runner: Run) -> Watch:
    """Put clocks around the parts of a run of an AmusedModel."""
    clock, model, optim = Clock(), runner.trainable, runner.optim_wrapper
    transformer = model.module("transformer")
    for owner, method, part in [
        (model.preprocessor, "encode", "VQ"),
        (model.preprocessor, "text_ids", "text"),
        (model, "encode_text", "text"),
        (model, "forward", "head"),  # what of it is neither text nor transformer: the loss
        (transformer, "forward", "forward"),
        (transformer.mlm_layer, "forward", "head"),
        (optim, "backward", "backward"),
        (optim, "step", "optimizer"),
    ]:
        clock.around(owner, method, part)
    hook = Watch(clock)
    runner.register_hook(hook, priority="VERY_HIGH")
    return hook


def measure(model: Path, data: Path, work_dir: Path, resolution: int, settings: list[str]) -> list[dict[str, float]]:
    """The seconds of the parts, step by step."""
    named = {"data": str(data), "pretrained": str(model)}
    options = [*common.STEPS_ONLY, "log_every=1000", *settings]
    run = common.build(f"amused_{resolution}_own", work_dir, options, named)
    hook = watch(run)
    run.train()
    return hook.steps


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--size", nargs="+", choices=common.SIZES, default=["tiny"])
    parser.add_argument("--resolution", nargs="+", type=int, choices=(256, 512), default=[512])
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="images per step")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--warm-up", type=int, default=3, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=10, help="steps that are")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--cfg-options", nargs="+", default=[], help="settings: precision=bf16 compile=True")
    options = parser.parse_args(arguments)
    count = options.warm_up + options.steps
    settings = [f"num_workers={options.workers}", f"max_iters={count}", *options.cfg_options]
    print(f"milliseconds per step on {common.machine()}, medians of {options.steps} steps\n")
    table = common.Table("size", "px", "batch", "way", *PARTS, "all")
    with tempfile.TemporaryDirectory() as root:
        data = common.write_images(Path(root) / "data", count * max(options.batch))
        for size, resolution in itertools.product(options.size, options.resolution):
            model = common.make_model(Path(root) / f"{size}-{resolution}", size, resolution)
            for batch, way in itertools.product(options.batch, options.ways):
                with tempfile.TemporaryDirectory(dir=root) as scratch, common.aside():
                    tokens = common.tokens(way, Path(scratch) / "cache")
                    steps = measure(
                        model, data, Path(scratch) / "run", resolution,
                        [f"batch_size={batch}", *tokens, *settings],
                    )[options.warm_up :]  # fmt: skip
                seconds = [statistics.median(step[part] for step in steps) for part in PARTS]
                seconds.append(statistics.median(sum(step.values()) for step in steps))
                table.row(size, resolution, batch, way, *[f"{1e3 * value:.3g}" for value in seconds])


if __name__ == "__main__":
    main()
