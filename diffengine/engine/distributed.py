"""Processes and devices: start-up, the little that ranks tell one another, and DDP."""

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffengine.errors import UserError

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
                f"got {os.environ.get('LOCAL_WORLD_SIZE', local_rank + 1)} processes on this machine; expected at "
                f"most {torch.cuda.device_count()}, one per GPU: lower NPROC_PER_NODE"
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
        first = os.environ["SLURM_STEP_NODELIST"].split(",")[0].replace("[", "").split("-")
    except KeyError as error:
        raise UserError(f"--launcher slurm got no {error} in the environment; start it with srun") from error
    os.environ.setdefault("MASTER_ADDR", "-".join(first[:2]) if len(first) > 1 else first[0])
    os.environ.setdefault("MASTER_PORT", os.environ.get("PORT", "29500"))


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def add_counts(*counts: int) -> list[int]:
    """Host integers added over all ranks, in one exchange between hosts."""
    if world_size() == 1:
        return list(counts)
    total = torch.tensor(counts, dtype=torch.int64)
    dist.all_reduce(total)
    return total.tolist()


def from_rank_0(value: T) -> T:
    """A plain value of rank 0, on every rank."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait until every rank is here."""
    add_counts(0)


def wrap(model: nn.Module) -> nn.Module:
    """The model as ranks train it together; itself where there is one."""
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
