"""Runs an unmodified program, records when each of its optimizer steps ends, and stops it after the last one.

    python benchmarks/timed.py OUT.json STEPS SCRIPT.py ARGUMENT ...
    python benchmarks/timed.py OUT.json STEPS -m MODULE ARGUMENT ...

It does not synchronize with the device: on a GPU it records an event after each step and reads all events at the end.
This file needs only torch, so it runs in any environment.
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
    """The current time: a GPU event, or on a CPU the clock."""
    if not GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds between two marks."""
    return start.elapsed_time(end) / 1e3 if GPU else end - start


def peak_memory() -> float:
    """Peak GB that torch allocated on the GPU; on a CPU, peak resident memory of the process."""
    if GPU:
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class StepTimer:
    """Called after each optimizer step. After the last one it writes `out` and exits the program."""

    def __init__(self, out: Path, steps: int) -> None:
        self.out = out
        self.steps = steps
        self.marks: list[Any] = []
        self.first_ended = 0.0

    def __call__(self, optimizer: Any, arguments: Any, options: Any) -> None:
        self.marks.append(mark())
        if len(self.marks) == 1:
            if GPU:
                torch.cuda.synchronize()
            self.first_ended = time.time()  # end of the first step, on a clock that other processes share
        if len(self.marks) == self.steps:
            if GPU:
                torch.cuda.synchronize()
            result = {
                "first_ended": self.first_ended,
                "seconds": [between(*pair) for pair in zip(self.marks, self.marks[1:])],
                "memory_gb": peak_memory(),
                "torch": torch.__version__,
            }
            self.out.write_text(json.dumps(result), encoding="utf-8")
            raise SystemExit(0)


def main() -> None:
    out, steps, *program = sys.argv[1:]
    register_optimizer_step_post_hook(StepTimer(Path(out), int(steps)))
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
