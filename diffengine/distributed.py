"""Processes and devices: start-up, the few messages between ranks, and DDP.

An error on one rank must end all of them, with one line: a rank that waits for another hangs until a timeout. So
whatever may raise a `UserError` runs inside `on_rank_0` or `all_ranks`.
"""

import ctypes
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffengine.errors import PeerError, UserError, disk_errors, require
from diffengine.terminal import say
from diffengine.text import one_line, shown

T = TypeVar("T")

CPU = torch.device("cpu")
PR_SET_PDEATHSIG = 1  # of Linux's prctl
MOST = 2**20  # processes of a run


def whole(name: str, least: int, most: int, default: int | None = None) -> int:
    """The whole number in an environment variable; a UserError if it is none, or out of range."""
    text = os.environ.get(name, "" if default is None else str(default))
    valid = text.isdecimal() and len(text) < 10 and least <= int(text) <= most
    require(valid, f"{name} got {shown(text)} in the environment; expected a whole number from {least} to {most:,}")
    return int(text)


def start(launcher: str = "none") -> torch.device:
    """Join the process group that the environment names, if any, and return this process's device.

    Host tensors travel over gloo and device tensors over nccl, so counts are added up without reading the device.

    Args:
        launcher: "none" (join only if RANK is set), "pytorch" (torchrun or accelerate) or "slurm" (srun).

    Raises:
        UserError: the launcher's variables are missing, or there are more processes than GPUs.
    """
    env, cuda = os.environ, torch.cuda.is_available()
    if launcher == "slurm":
        _read_slurm()
    if launcher == "pytorch":
        require("RANK" in env, "--launcher pytorch got no RANK in the environment; start it with torchrun")
    local_rank = whole("LOCAL_RANK", 0, MOST, 0)
    if cuda:
        processes, gpus = env.get("LOCAL_WORLD_SIZE", local_rank + 1), torch.cuda.device_count()
        require(
            local_rank < gpus, f"got {processes} processes on {gpus} GPUs; expected one per GPU: lower NPROC_PER_NODE"
        )
        torch.cuda.set_device(local_rank)
    if "RANK" in env and not dist.is_initialized():
        whole("RANK", 0, whole("WORLD_SIZE", 1, MOST) - 1)
        port, host = whole("MASTER_PORT", 0, 2**16 - 1), env.get("MASTER_ADDR")
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        except (RuntimeError, ValueError) as error:
            advice = "check MASTER_ADDR, and that no other process uses MASTER_PORT"
            raise UserError(f"the processes cannot meet at {host}, port {port}: {one_line(error)}; {advice}") from error
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def _read_slurm() -> None:
    """Set torch's variables from srun's."""
    try:
        os.environ.setdefault("RANK", os.environ["SLURM_PROCID"])
        os.environ.setdefault("WORLD_SIZE", os.environ["SLURM_NTASKS"])
        os.environ.setdefault("LOCAL_RANK", os.environ["SLURM_LOCALID"])
        os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
    except KeyError as error:
        raise UserError(f"--launcher slurm got no {error} in the environment; start it with srun") from error
    os.environ.setdefault("MASTER_PORT", os.environ.get("PORT", "29500"))


def first_host(nodes: str) -> str:
    """The first host of Slurm's node list: "gpu-01" of "gpu-[01-04,07],cpu1"."""
    prefix, number = re.match(r"([^\[,]*)(?:\[(\d+))?", nodes).groups(default="")  # type: ignore[union-attr]
    return prefix + number


def end_with_parent(parent: int, signum: int = signal.SIGKILL) -> None:
    """Have this process sent a signal when its parent, the process id `parent`, ends however it ends; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signum)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print_once(line: str) -> None:
    """Print a line on rank 0."""
    if rank() == 0:
        say(line)


def add_counts(*counts: float) -> list[float]:
    """Host numbers summed over all ranks in one exchange between hosts; exact for integers below 2^53."""
    if world_size() == 1:
        return list(counts)
    total = torch.tensor(counts, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gathered(value: T) -> list[T]:
    """The plain values of all ranks, by rank."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def on_rank_0(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 and return its plain value on every rank: for reads and writes that one rank does.

    Every rank waits, so `work` may take as long as the process group's timeout. Errors are raised as by `all_ranks`.
    """
    if world_size() == 1:
        return work()
    value: list[Any] = [None]
    with all_ranks():
        if rank() == 0:
            value[0] = work()
    dist.broadcast_object_list(value, src=0)
    return value[0]


@contextmanager
def all_ranks() -> Iterator[None]:
    """Every rank leaves the block only if it succeeded on all; else all raise, as by `share_error`.

    A full disk counts as a UserError. The block must not talk to other ranks.
    """
    error: UserError | None = None
    try:
        with disk_errors():
            yield
    except UserError as caught:
        error = caught
    share_error(error)


def share_error(error: UserError | None) -> None:
    """Raise on every rank if any has an error: the first such rank raises its own, the others `PeerError`."""
    texts: list[Any] = [None if error is None else str(error)] * world_size()
    if len(texts) > 1:
        dist.all_gather_object(texts, texts[0])
    for index, text in enumerate(texts):
        if text is not None:
            raise error if error is not None and index == rank() else PeerError(text)


def wrap(model: nn.Module) -> nn.Module:
    """The model wrapped in DDP; the model itself for a single process."""
    if world_size() == 1:
        return model
    # The gradient of a depthwise kernel has another, equal layout and is copied. What torch 2.13 recommends instead of
    # broadcast_buffers does not exist in older versions.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
