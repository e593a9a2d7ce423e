"""Kill runs at random moments, resume them, and compare each with the run that was never stopped.

    python -m benchmarks.soak --kills 100
    python -m benchmarks.soak --kills 40 --ranks 2
    python -m benchmarks.soak --full-disk

A small run with everything on (token cache, average, validation, previews, page, export) is stopped once and continued
with --resume. Its checkpoints, metrics, previews, export and cache must then be equal, and no temporary file may
remain. With several ranks one of them is stopped, and the others must end by themselves. The moments, in turns:

    any time          SIGKILL after a random time
    file              SIGKILL before a random change in the file system: create, rename, delete
    half checkpoint   SIGKILL when half of a random checkpoint is written
    SIGTERM           after a random time
    SIGSTOP           after a random time, and SIGCONT a moment later: the run goes on

With --full-disk the disk is full from each change of the file system on, one run per change. The run must end with exit
code 2 and one line, unless only its page is missing, and resume as above.

Processes are forked, so that none spends its time on imports.
"""

import argparse
import errno
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from diffengine import cli
from diffengine.engine import checkpoint
from tests.engine.runs import assert_equal, results
from tests.support import models, photos
from tests.support.processes import free_port

LAST = 8  # the last step of a run
MOMENTS = ("any time", "file", "half checkpoint", "SIGTERM", "SIGSTOP")
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link")  # audit events; and files opened for writing
CONFIG = """
from diffengine.engine.hooks import EMAHook

extends = "amused"
data, validation_data, pretrained = {data!r}, {held_out!r}, {model!r}
resolution, batch_size, num_workers, max_iters, log_every = 32, 4, 0, {last}, 3
cache, image_variations, cache_path = True, 1, "cache"
checkpoint_every, keep_checkpoints, validation_every, preview_every, prompts = 3, None, 4, 4, ["a cat"]
custom_hooks = [dict(type=EMAHook)]
"""
FULL = "full disk"
PATIENCE = 60.0  # seconds after which a process hangs
Process = multiprocessing.context.ForkProcess
Sabotage = Callable[[], None]  # called in a process before it trains


@dataclass
class Trial:
    """What became of a run that was stopped."""

    moment: str
    step: int  # of its last checkpoint; 0 if it had none
    problem: str  # how it differs from the run that was never stopped; "" if it does not


def is_change(event: str, args: tuple[Any, ...]) -> bool:
    """Whether an audit event changes the file system."""
    opened = event == "open" and isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return opened or event in CHANGES


def kill_before_change(count: int) -> None:
    """Kill this process before its change number `count` in the file system, from 0."""
    numbers = itertools.count()

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if is_change(event, args) and next(numbers) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def fill_before_change(count: int) -> None:
    """From change number `count` in the file system on, from 0, there is no space for this process."""
    numbers = itertools.count()

    def audit(event: str, args: tuple[Any, ...]) -> None:
        frees = event in ("os.remove", "os.rmdir")
        if is_change(event, args) and next(numbers) >= count and not frees:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

    sys.addaudithook(audit)


def count_changes(file: Path) -> None:
    """Append a byte to a file per change of this process in the file system."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.addaudithook(lambda event, args: is_change(event, args) and os.write(descriptor, b".") and None)


def kill_in_checkpoint(count: int) -> None:
    """Kill this process when half of its checkpoint number `count`, from 0, is written."""
    numbers, save = itertools.count(), torch.save

    def save_half(state: Any, path: Path) -> None:
        save(state, path)
        if next(numbers) == count:
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half


def send(signals: Sequence[int], after: float, process: Process) -> None:
    """Send signals to a process after so many seconds, half a second between two."""
    time.sleep(after)
    for number in signals:
        with suppress(ProcessLookupError):
            os.kill(process.pid or 0, number)
        time.sleep(0.5 * (len(signals) > 1))


class Soak:
    """Trains in a folder that has a model, images and a config."""

    def __init__(self, root: Path, ranks: int, seed: int) -> None:
        self.root, self.ranks, self.random = root, ranks, random.Random(seed)
        models.make_model_folder(root / "model", "toy")
        photos.write_photo_folder(root / "data", 10, 40)
        photos.write_photo_folder(root / "held_out", 2, 48)
        folders = {name: str(root / name) for name in ("model", "data", "held_out")}
        config = CONFIG.format(**folders, last=LAST)
        (root / "soak.py").write_text(config, encoding="utf-8")
        started = time.monotonic()
        codes = self.train("reference", sabotage=partial(count_changes, root / "changes"))
        self.seconds = time.monotonic() - started
        if set(codes) != {0}:
            sys.exit(f"the reference run ended with {codes}: {self.output('reference')}")
        self.changes = (root / "changes").stat().st_size

    def train(self, name: str, *flags: str, sabotage: Sabotage | None = None, signals: Any = None) -> list[int | None]:
        """Train in the folder `name`; returns the exit codes by rank, None for one that hangs.

        `sabotage` and `signals` are for one rank: the first with 'file' and 'half checkpoint', since it alone writes.
        """
        port = free_port()
        (self.root / name).mkdir(exist_ok=True)
        fork = multiprocessing.get_context("fork")
        processes = []
        for rank in range(self.ranks):
            environment = {"RANK": rank, "WORLD_SIZE": self.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            arguments = (self.root, name, flags, None if rank else sabotage, environment if self.ranks > 1 else {})
            processes.append(fork.Process(target=_train, args=arguments))
        for process in processes:
            process.start()
        if signals:
            numbers, after = signals
            send(numbers, after, self.random.choice(processes))
        ends = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(0.0, ends - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        return codes

    def output(self, name: str) -> str:
        """What the processes of a run printed last."""
        return " | ".join((self.root / name / "output.txt").read_text(errors="replace").splitlines()[-3:])

    def stop_and_resume(self, number: int) -> Trial:
        """Stop a run at the moment that is due, and resume it."""
        moment, name = MOMENTS[number % len(MOMENTS)], f"run-{number}"
        after = self.random.uniform(0, self.seconds)
        if moment == "file":
            codes = self.train(name, sabotage=partial(kill_before_change, self.random.randrange(self.changes)))
        elif moment == "half checkpoint":
            codes = self.train(name, sabotage=partial(kill_in_checkpoint, self.random.randrange(4)))
        else:
            signals = {"any time": [signal.SIGKILL], "SIGTERM": [signal.SIGTERM]}
            codes = self.train(name, signals=(signals.get(moment, [signal.SIGSTOP, signal.SIGCONT]), after))
        return self.resume(name, moment, codes)

    def fill_and_resume(self, count: int) -> Trial:
        """Train on a disk that is full from change number `count` on, and resume on one that is not."""
        name = f"full-{count}"
        codes = self.train(name, sabotage=partial(fill_before_change, count))
        output = (self.root / name / "output.txt").read_text(errors="replace")
        errors = output.count("diffengine train: error: ")
        if {*codes} - {0, 2} or errors != any(codes) or "Traceback" in output:
            return Trial(FULL, 0, f"change {count} ended with {codes}: {self.output(name)}")
        return self.resume(name, FULL, codes)

    def resume(self, name: str, moment: str, codes: Sequence[int | None]) -> Trial:
        """Resume a run that ended with these exit codes, and compare it with the one that was never stopped."""
        step = max([checkpoint.steps(path) for path in checkpoint.paths(self.root / name / "run")], default=0)
        if None in codes:
            return Trial(moment, step, f"hangs after {codes}: {self.output(name)}")
        if any(codes):
            resumed = self.train(name, "--resume")
            if any(resumed):
                return Trial(moment, step, f"resumed after {codes} with {resumed}: {self.output(name)}")
        problem = difference(self.root / name, self.root / "reference")
        if not problem:
            shutil.rmtree(self.root / name)
        return Trial(moment, step, problem)


def _train(root: Path, name: str, flags: Sequence[str], sabotage: Sabotage | None, environment: dict) -> None:
    """Train in this process, which was forked for it."""
    os.setsid()
    os.chdir(root / name)
    descriptor = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update({key: str(value) for key, value in environment.items()})
    if sabotage is not None:
        sabotage()
    os._exit(cli.main(["train", str(root / "soak.py"), "--work-dir", "run", *flags]))


def difference(folder: Path, expected: Path) -> str:
    """How a run and its cache differ from another's, and what temporary files it left; "" if in nothing."""
    for file in sorted(path for path in expected.rglob("*") if path.is_file() and path.parent.name != "tensorboard"):
        name = file.relative_to(expected)
        if not (folder / name).exists():
            return f"{name} is missing"
        compared = file.suffix in (".safetensors", ".arrow") or "previews" in name.parts
        if compared and (folder / name).read_bytes() != file.read_bytes():
            return f"{name} differs"
    if left := _hidden(folder) - _hidden(expected):
        return f"left {sorted(map(str, left))}"
    if results(folder / "run") != results(expected / "run"):
        return "metrics.jsonl differs"
    for path in [*checkpoint.paths(expected / "run"), expected / "run" / checkpoint.BEST]:
        try:
            assert_equal(_exact(folder / "run" / path.name), _exact(path))
        except AssertionError as error:
            return f"{path.name} differs: {error}"
    return ""


def _hidden(folder: Path) -> set[Path]:
    """Temporary files and locks."""
    return {path.relative_to(folder) for pattern in (".*", "*.tmp") for path in folder.rglob(pattern)}


def _exact(path: Path) -> dict[str, Any]:
    """A checkpoint without its folder, and without the time that its steps took."""
    state = checkpoint.read(path)
    window = {key: value for key, value in state["metrics"].items() if key not in ("seconds", "waited")}
    return {**state, "metrics": window, "folder": None}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="runs that are stopped")
    parser.add_argument("--full-disk", action="store_true", help="fill the disk instead, before each change")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep runs that differ here")
    options = parser.parse_args(arguments)
    started = time.strftime("%Y-%m-%d")
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    with tempfile.TemporaryDirectory() as scratch:
        soak = Soak(options.folder or Path(scratch), options.ranks, options.seed)
        stop = soak.fill_and_resume if options.full_disk else soak.stop_and_resume
        trials = [stop(number) for number in range(soak.changes if options.full_disk else options.kills)]
    print(f"{len(trials)} stopped runs, {options.ranks} ranks, seed {options.seed}, {started}, {common.machine()}\n")
    table = common.Table("stopped by", "runs", "had a checkpoint", "equal")
    for moment in dict.fromkeys(trial.moment for trial in trials):
        own = [trial for trial in trials if trial.moment == moment]
        table.row(moment, len(own), sum(trial.step > 0 for trial in own), sum(not trial.problem for trial in own))
    if problems := [f"{trial.moment}: {trial.problem}" for trial in trials if trial.problem]:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
