"""Seconds from the start of `diffengine train --resume` to the end of its first step, far into a run.

    python -m benchmarks.resume --at 10 10000 1000000

A small run is taken for one step and its checkpoint made that of a later one: the counters, the schedule's
and the optimizer's own counts, and metrics.jsonl with the lines that such a run would have written.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from diffengine.engine import checkpoint

LOG_EVERY = 10  # the recipe's
BATCH = 4


def command(root: Path, work_dir: Path, *flags: str, max_iters: int) -> list[str]:
    """`diffengine train` of the small run."""
    return common.diffengine(
        "train", "amused_512_own", root / "model", root / "data", work_dir, *flags, "--cfg-options",
        "default_hooks.preview=None", "default_hooks.export=None", f"batch_size={BATCH}", "num_workers=0",
        "checkpoint_every=1", f"log_every={LOG_EVERY}", "cache=False", f"max_iters={max_iters}",
    )  # fmt: skip


def moved(state: dict[str, Any], iteration: int) -> dict[str, Any]:
    """The checkpoint as if it had been written after `iteration` steps."""
    for values in state["optimizer"]["state"].values():
        values["step"] = torch.full_like(values["step"], float(iteration))
    state["counters"] = {"iter": iteration, "epoch": iteration * BATCH // state["num_samples"]}
    state["param_scheduler"].update(last_epoch=iteration, _step_count=iteration + 1)
    return state


def move(work_dir: Path, iteration: int) -> None:
    """Make the run of one step in `work_dir` one of `iteration` steps."""
    first = work_dir / "iter_1.pth"
    checkpoint.write(work_dir / f"iter_{iteration}.pth", moved(checkpoint.read(first), iteration))
    first.unlink()
    metrics = work_dir / "metrics.jsonl"
    line = json.loads(metrics.read_text(encoding="utf-8").splitlines()[0])
    steps = [1, *range(LOG_EVERY, iteration + 1, LOG_EVERY)]
    metrics.write_text("".join(json.dumps({**line, "iter": step}) + "\n" for step in steps), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--at", nargs="+", type=int, default=[10, 10_000, 1_000_000], help="iterations")
    parser.add_argument("--repeats", type=int, default=3, help="starts of each, in turns")
    options = parser.parse_args(arguments)
    print(f"seconds to the first step, {options.repeats} starts on {common.machine()}\n")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        common.make_model(root / "model", "tiny", 512)
        common.write_images(root / "data", 16)
        for iteration in options.at:
            problem = common.python(*command(root, root / str(iteration), max_iters=1))
            if problem:
                sys.exit(problem)
            move(root / str(iteration), iteration)
        seconds: dict[int, list[float]] = {iteration: [] for iteration in options.at}
        for turn in range(options.repeats + 1):  # the first finds files that no one has read yet
            for iteration in options.at:
                resumed = command(root, root / str(iteration), "--resume", max_iters=iteration + 1000)
                found = common.timed(resumed, 1)
                if isinstance(found, str):
                    sys.exit(found)
                if turn:
                    seconds[iteration].append(found.first)
    table = common.Table("from iteration", "seconds to the first step", "more than the first row")
    base = statistics.median(seconds[options.at[0]])
    for iteration, values in seconds.items():
        more = statistics.median(values) - base
        table.row(f"{iteration:,}", common.spread(values), f"{more:+.2f}")


if __name__ == "__main__":
    main()
