"""Whether a run compiles the blocks of its model."""

import os
import shutil
from typing import Literal

import torch

from diffengine.errors import UserError
from diffengine.models.base import TrainableModel

PAYS_FROM = 1000  # steps: an estimate, of a minute to compile against 0.05 s saved per step
Compile = bool | Literal["auto"]


def compile_model(compile: Compile, model: TrainableModel, steps: int, device: torch.device) -> str:
    """Compile the blocks of `model` if that is asked for or, on a GPU, pays ("auto"); return how they run and why."""
    lack = missing_compiler(device)
    if compile == "auto":
        if device.type == "cpu":
            return "eager (auto, on a CPU)"
        if steps < PAYS_FROM:
            return f"eager (auto, compiling pays from {PAYS_FROM} steps on and there are {steps})"
        if lack:
            return f"eager (auto, this machine has no {lack})"
    elif not compile:
        return "eager (as configured)"
    elif lack:
        raise UserError(
            f"compile got True, but this machine has no {lack}; install it, or set --cfg-options compile=auto"
        )
    blocks = model.compile_blocks()
    if blocks == 0 and compile is True:
        raise UserError("compile got True, but this model has no blocks to compile; set --cfg-options compile=False")
    why = f"auto, for {steps} steps" if compile == "auto" else "as configured"
    return f"compiled, {blocks} of them ({why})" if blocks else "eager (auto, it has no blocks to compile)"


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile needs for this device and does not find; None if it has all."""
    variable, *names = ("CXX", "g++", "clang++")
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "Triton that works with this GPU"
        variable, *names = ("CC", "gcc", "clang")  # Triton's own
    found = any(shutil.which(name) for name in (os.environ.get(variable, ""), *names))
    return None if found else f"compiler ({', '.join(names)} or {variable})"
