"""In which precision a run computes: as configured, what its GPU has, or what a CPU is faster in."""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from diffengine import distributed
from diffengine.errors import UserError
from diffengine.models.base import TrainableModel
from diffengine.models.frozen import frozen_in, frozen_parameters

if TYPE_CHECKING:
    from diffengine.engine.optim import StepOptimWrapper

Precision = Literal["auto", "bf16", "fp16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast; fp32 has none
PAYS_FROM = 1.2  # times as fast as fp32
LARGEST_SHARE = 0.01  # of a run's time
PAIRS = 3  # timed, after one that warms up; fewer if they take too long
FEWEST_PASSES = round(4 / LARGEST_SHARE)  # of a run: warming up and one timed pair are 4 passes
TOO_SHORT = "auto, on a CPU, too few steps to measure bf16"


def resolve_precision(precision: Precision, device: torch.device, kept: str | None = None) -> tuple[str, str]:
    """(the precision that a step computes in, why).

    "auto" is bf16 if the GPU has it in hardware, else fp16 with a loss scaler. On a CPU it is what `measure` finds, and
    fp32 until then. `kept` is what a resumed run computed in; on a CPU it stays.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError(
            "precision got 'fp16' on a CPU, where it is slower than fp32; set --cfg-options precision=fp32, or bf16"
        )
    if precision != "auto":
        return precision, "as configured"
    if device.type == "cpu":
        if kept == "bf16" and not cpu_has_bf16():
            return "bf16", "auto, as the run began; this CPU has no bf16, so steps are slow"
        if kept in ("fp32", "bf16"):
            return kept, "auto, as the run began"
        return "fp32", TOO_SHORT if cpu_has_bf16() else "auto, on a CPU without bf16"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "auto, this GPU has bf16"
    return "fp16", "auto, this GPU has no bf16"


@cache
def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices in hardware."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return not {"avx512_bf16", "amx_bf16"}.isdisjoint(line.split())
    return False


def is_measured(precision: Precision, device: torch.device, passes: int) -> bool:
    """Whether a run that starts with "auto", and takes so many forward and backward passes, measures."""
    return precision == "auto" and device.type == "cpu" and cpu_has_bf16() and passes >= FEWEST_PASSES


def measure(
    model: TrainableModel, optim: "StepOptimWrapper", batch: dict[str, Any], step: int, passes: int
) -> tuple[str, str]:
    """Time forward and backward of a micro-batch in fp32 and in bf16, in turns; (the precision to take, why).

    All ranks call it, since a model may talk to others in `forward`, and rank 0 decides. It ends once the next pair
    would make it longer than `LARGEST_SHARE` of the run. Weights, buffers and generators are as before.
    """
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
    started = time.perf_counter()

    def goes_on() -> bool:
        pair, fastest = sum(values[-1] for values in seconds.values()), min(seconds["fp32"])
        spent = time.perf_counter() - started
        return len(seconds["fp32"]) <= PAIRS and spent + pair <= LARGEST_SHARE * passes * fastest

    with unchanged(model):
        prepared, holding = model.prepare(batch), _Holding(model)
        while not seconds["bf16"] or distributed.on_rank_0(goes_on):
            for optim.precision, values in seconds.items():
                holding.switch(optim.precision)
                values.append(_time_pass(model, optim, prepared, step))
        seconds = distributed.on_rank_0(lambda: seconds)
        fp32, bf16 = (statistics.median(values[1:] or [0.0]) for values in seconds.values())
        optim.precision = "bf16" if bf16 and fp32 / bf16 >= PAYS_FROM else "fp32"
        holding.switch(optim.precision)
    if optim.precision == "fp32":
        if optim.copies is not None:
            optim.copies.free()
        for module in frozen_in(model):
            module.hold(None)
    return optim.precision, f"auto, measured: {fp32:.3g} s in fp32, {bf16:.3g} s in bf16" if bf16 else TOO_SHORT


def _time_pass(model: TrainableModel, optim: "StepOptimWrapper", prepared: dict[str, Any], step: int) -> float:
    """Seconds of a forward and a backward pass, as `StepLoop` takes them."""
    model.before_step(step)
    started = time.perf_counter()
    with optim.cast_weights():
        with optim.autocast():
            loss, _ = model(prepared)
        optim.backward(loss)
    seconds = time.perf_counter() - started
    optim.zero_grad(set_to_none=True)
    return seconds


@contextmanager
def unchanged(model: TrainableModel) -> Iterator[None]:
    """Restore trained weights, buffers and the generators of the host afterwards: passes may change them."""
    live = [*(item for item in model.parameters() if item.requires_grad), *model.buffers()]
    before = [tensor.clone() for tensor in live]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(live, before):
                    tensor.copy_(value)


class _Holding:
    """Switches frozen weights between fp32 and what `hold_frozen` makes of them; the first pass has loaded them."""

    def __init__(self, model: TrainableModel) -> None:
        self._model = model
        self._data: dict[str, Sequence[Tensor]] = {}

    def switch(self, precision: str) -> None:
        if precision == "bf16" and not self._data:
            self._data["fp32"] = [parameter.data for parameter in frozen_parameters(self._model)]
            self._model.hold_frozen(DTYPES[precision])
            self._data["bf16"] = [parameter.data for parameter in frozen_parameters(self._model)]
        elif self._data:
            for parameter, data in zip(frozen_parameters(self._model), self._data[precision]):
                parameter.data = data
