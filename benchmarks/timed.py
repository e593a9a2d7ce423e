"""Runs a program as it is and notes when each of its optimizer steps ended; then ends it.

    python benchmarks/timed.py OUT.json STEPS SCRIPT.py ARGUMENT ...
    python benchmarks/timed.py OUT.json STEPS -m MODULE ARGUMENT ...

Nothing of the program is changed, and the device is not waited for: on a GPU an event is recorded after each
step, and all are read at the end. This file needs nothing but torch, so it runs in any environment.
"""

import json
import resource
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

GPU = torch.cuda.is_available()


def mark() -> Any:
    """This moment: of the GPU's work so far, or of the clock."""
    if not GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds."""
    return start.elapsed_time(end) / 1e3 if GPU else end - start


def peak_memory() -> float:
    """GB: the most that torch had allocated on the GPU; on a CPU the process's resident memory."""
    if GPU:
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Watch:
    """Called after each step of any optimizer; after the last one it writes `out` and ends the program."""

    def __init__(self, out: Path, steps: int) -> None:
        self.out = out
        self.steps = steps
        self.marks: list[Any] = []
        self.ended = 0.0

    def __call__(self, optimizer: Any, arguments: Any, options: Any) -> None:
        self.marks.append(mark())
        if len(self.marks) == 1:
            if GPU:
                torch.cuda.synchronize()
            self.ended = time.time()  # of the first step, by a clock that other processes share
        if len(self.marks) == self.steps:
            if GPU:
                torch.cuda.synchronize()
            found = {
                "ended": self.ended,
                "seconds": [between(*pair) for pair in zip(self.marks, self.marks[1:])],
                "memory_gb": peak_memory(),
                "torch": torch.__version__,
            }
            self.out.write_text(json.dumps(found), encoding="utf-8")
            raise SystemExit(0)


def main() -> None:
    out, steps, *program = sys.argv[1:]
    register_optimizer_step_post_hook(Watch(Path(out), int(steps)))
    if program[0] == "-m":
        sys.path[0] = ""
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(program[0]).parent)
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main()
