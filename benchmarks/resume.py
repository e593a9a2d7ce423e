"""Seconds from the start of `diffengine train --resume` to the end of its first step, early and late in a run.

    python -m benchmarks.resume --at 10 10000 1000000

A small run takes one step. Its checkpoint is then changed to look like a later one: the counters, the step counts of
the scheduler and the optimizer, and the lines that a run of that length would have written to metrics.jsonl.
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

LOG_EVERY = 10  # as in the recipe
BATCH = 4


def command(root: Path, work_dir: Path, *flags: str, max_iters: int) -> list[str]:
    """The `diffengine train` command of the small run."""
    return common.diffengine_command(
        "train", "amused_512_own", root / "model", root / "data", work_dir, *flags, "--cfg-options",
        "default_hooks.preview=None", "default_hooks.export=None", f"batch_size={BATCH}", "num_workers=0",
        "checkpoint_every=1", f"log_every={LOG_EVERY}", "cache=False", f"max_iters={max_iters}",
    )  # fmt: skip


def change_checkpoint(state: dict[str, Any], iteration: int) -> dict[str, Any]:
    """Change a checkpoint to look as if it was written after `iteration` steps."""
    for values in state["optimizer"]["state"].values():
        values["step"] = torch.full_like(values["step"], float(iteration))
    state["counters"] = {"iter": iteration, "epoch": iteration * BATCH // state["num_samples"]}
    state["param_scheduler"].update(last_epoch=iteration, _step_count=iteration + 1)
    return state


def change_run(work_dir: Path, iteration: int) -> None:
    """Change the run in `work_dir`, which took one step, to look as if it took `iteration` steps."""
    first = work_dir / "iter_1.pth"
    checkpoint.write(work_dir / f"iter_{iteration}.pth", change_checkpoint(checkpoint.read(first), iteration))
    first.unlink()
    metrics = work_dir / "metrics.jsonl"
    line = json.loads(metrics.read_text(encoding="utf-8").splitlines()[0])
    steps = [1, *range(LOG_EVERY, iteration + 1, LOG_EVERY)]
    metrics.write_text("".join(json.dumps({**line, "iter": step}) + "\n" for step in steps), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--at", nargs="+", type=int, default=[10, 10_000, 1_000_000], help="iterations to resume at")
    parser.add_argument("--repeats", type=int, default=3, help="starts per iteration, in turns")
    options = parser.parse_args(arguments)
    print(f"seconds to the first step, {options.repeats} starts on {common.machine()}\n")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        common.make_model(root / "model", "tiny", 512)
        common.write_images(root / "data", 16)
        for iteration in options.at:
            problem = common.run_python(*command(root, root / str(iteration), max_iters=1))
            if problem:
                sys.exit(problem)
            change_run(root / str(iteration), iteration)
        seconds: dict[int, list[float]] = {iteration: [] for iteration in options.at}
        for repeat in range(options.repeats + 1):  # the first one is a warm-up: its files are not in the page cache yet
            for iteration in options.at:
                resumed = command(root, root / str(iteration), "--resume", max_iters=iteration + 1000)
                result = common.run_timed(resumed, 1)
                if isinstance(result, str):
                    sys.exit(result)
                if repeat:
                    seconds[iteration].append(result.first)
    table = common.Table("resumed at", "seconds to the first step", "difference to the first row")
    base = statistics.median(seconds[options.at[0]])
    for iteration, values in seconds.items():
        difference = statistics.median(values) - base
        table.row(f"{iteration:,}", common.spread(values), f"{difference:+.2f}")


if __name__ == "__main__":
    main()
