"""Processes and devices: start-up, the little that ranks tell one another, and DDP.

A problem on one rank must end all of them, with one line: a rank that is left waiting for another hangs until a
timeout. So whatever may raise a `UserError` runs inside `on_rank_0` or `on_all_ranks`.
"""

import os
import re
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffengine.errors import Told, UserError, disk_for_user

T = TypeVar("T")


def start(launcher: str = "none") -> torch.device:
    """Join the process group that the environment names, if it names one, and pick this process's device.

    Host tensors travel by gloo and device tensors by nccl, so that counts are added without a device read.

    Args:
        launcher: "none" (join only where RANK is set), "pytorch" (torchrun or accelerate) or "slurm" (srun).
    """
    if launcher == "slurm":
        _read_slurm()
    if launcher == "pytorch" and "RANK" not in os.environ:
        raise UserError("--launcher pytorch got no RANK in the environment; start it with torchrun, or leave it out")
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"got {os.environ.get('LOCAL_WORLD_SIZE', local_rank + 1)} processes on this machine; "
                f"expected at most {torch.cuda.device_count()}, one per GPU: lower NPROC_PER_NODE"
            )
        torch.cuda.set_device(local_rank)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def _read_slurm() -> None:
    """Name torch's variables after srun's."""
    try:
        os.environ.setdefault("RANK", os.environ["SLURM_PROCID"])
        os.environ.setdefault("WORLD_SIZE", os.environ["SLURM_NTASKS"])
        os.environ.setdefault("LOCAL_RANK", os.environ["SLURM_LOCALID"])
        os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
    except KeyError as error:
        raise UserError(f"--launcher slurm got no {error} in the environment; start it with srun") from error
    os.environ.setdefault("MASTER_PORT", os.environ.get("PORT", "29500"))


def first_host(nodes: str) -> str:
    """The first of Slurm's node list: "gpu-01" of "gpu-[01-04,07],cpu1"."""
    prefix, number = re.match(r"([^\[,]*)(?:\[(\d+))?", nodes).groups(default="")  # type: ignore[union-attr]
    return prefix + number


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def add_counts(*counts: float) -> list[float]:
    """Host numbers added over all ranks, in one exchange between hosts: exact for integers, below 2^53."""
    if world_size() == 1:
        return list(counts)
    total = torch.tensor(counts, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def on_rank_0(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank, once it is done; for reading and writing that one rank
    does.

    Its value must be plain. Every rank waits, so a slow `work` may take as long as the process group's
    timeout.

    Raises:
        UserError: `work` raised it on rank 0, or the disk refused it. The others raise `Told`, so that none
            is left waiting.
    """
    if world_size() == 1:
        return work()
    problem: UserError | None = None
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            with disk_for_user():
                box[1] = work()
        except UserError as error:
            problem, box[0] = error, str(error)
    dist.broadcast_object_list(box, src=0)
    _raise_together(problem, box[0])
    return box[1]


def on_all_ranks(work: Callable[[], T]) -> T:
    """`work`'s value on this rank, once it succeeded on all; it must not talk to other ranks.

    Raises:
        UserError: `work` raised it here; or `Told`, where it raised on another rank.
    """
    problem: UserError | None = None
    value: T | None = None
    try:
        with disk_for_user():
            value = work()
    except UserError as error:
        problem = error
    share_problem(problem)
    return value  # type: ignore[return-value]


def share_problem(problem: UserError | None) -> None:
    """Raise on every rank if any rank has a problem: the first such rank its own, the others `Told`."""
    if world_size() == 1:
        _raise_together(problem, None)
        return
    texts: list[Any] = [None] * world_size()
    dist.all_gather_object(texts, None if problem is None else str(problem))
    first = next((index for index, text in enumerate(texts) if text is not None), None)
    _raise_together(problem if rank() == first else None, None if first is None else texts[first])


def _raise_together(own: UserError | None, text: str | None) -> None:
    if own is not None:
        raise own
    if text is not None:
        raise Told(text)


def wrap(model: nn.Module) -> nn.Module:
    """The model as ranks train it together; itself where there is one."""
    if world_size() == 1:
        return model
    # A depthwise kernel's gradient comes in another of its equal layouts, and is copied; and what torch
    # 2.13 would have in place of broadcast_buffers, older ones do not know.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
