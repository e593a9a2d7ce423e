"""The optimizer, its two groups, its schedule, and the precision of a step."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, final

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from diffengine.engine.mmengine_seam import OptimWrapper
from diffengine.errors import UserError
from diffengine.registry import build, resolve

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
Precision = Literal["auto", "bf16", "fp16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast; fp32 has none


def resolve_precision(precision: Precision, device: torch.device) -> tuple[str, str]:
    """(the precision that a step computes in, why).

    "auto" is bf16 if the GPU has it in hardware, else fp16 with a loss scaler, and fp32 on a CPU.

    Raises:
        UserError: fp16 on a CPU.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision got 'fp16' on a CPU, where it is slower than fp32; set precision=fp32 or bf16")
    if precision != "auto":
        return precision, "as configured"
    if device.type == "cpu":
        return "fp32", "auto, on a CPU"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "auto, this GPU has bf16"
    return "fp16", "auto, this GPU has no bf16"


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The trained parameters in two groups: with the optimizer's weight decay, and without.

    Matrices and kernels decay. Embeddings do not, and neither do parameters that are vectors once axes of size 1 are
    dropped: norms, biases, and GRN's gamma and beta of shape (1,1,1,C), which names alone would miss.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                decays = not isinstance(module, nn.Embedding) and parameter.squeeze().ndim >= 2
                groups[decays].append(parameter)
    return [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}]


def build_optimizer(optimizer: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """Build any torch-style optimizer; those that can on every device are fused: one kernel for all parameters.

    Args:
        optimizer: `dict(type=AdamW, lr=...)`.
        groups: the parameters, as `parameter_groups` returns them.

    Raises:
        UserError: the class refuses its options, or has no learning rate for a schedule to change.
    """
    options = dict(optimizer)
    if resolve(options["type"]) in FUSED and options.get("fused") is None and not options.get("foreach"):
        options["fused"] = True
    try:
        built = build(options, params=list(groups))
    except ValueError as error:
        raise UserError(f"optimizer {options['type']}: {error}") from error
    for group in built.param_groups:
        if not isinstance(group.get("lr"), int | float):
            raise UserError(
                f"optimizer {options['type']} got lr={group.get('lr')}; expected a number, which the schedule changes "
                "(Adafactor: set lr and relative_step=False)"
            )
    return built


def build_optim_wrapper(
    optimizer: dict, precision: Precision = "auto", clip_grad: float | None = None, *, model: nn.Module
) -> "StepOptimWrapper":
    """The `optim_wrapper` section.

    Args:
        optimizer: `dict(type=AdamW, lr=..., weight_decay=...)`, any torch-style optimizer class.
        precision: of autocast over fp32 weights, see `resolve_precision`.
        clip_grad: the largest norm of all gradients together; None for no limit.
        model: given by the run.

    Raises:
        UserError: an option is out of range, or the optimizer cannot be built.
    """
    if clip_grad is not None and clip_grad <= 0:
        raise UserError(f"clip_grad got {clip_grad}; expected a number above 0, or None for no clipping")
    device = next(model.parameters()).device
    name, _ = resolve_precision(precision, device)
    built = build_optimizer(optimizer, parameter_groups(model))
    return StepOptimWrapper(built, name, clip_grad, device, optimizer)


def build_param_scheduler(
    name: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant",
    warmup_iters: int = 0,
    *,
    optimizer: torch.optim.Optimizer,
    num_iters: int,
) -> torch.optim.lr_scheduler.LRScheduler:
    """The `param_scheduler` section: diffusers' schedules by name, counted in optimizer steps.

    Args:
        name: as `--lr_scheduler` of diffusers' training scripts.
        warmup_iters: steps in which the rate rises from 0 (every schedule but "constant").
        optimizer, num_iters: given by the run.

    Raises:
        UserError: the warm-up is negative, or the schedule has none.
    """
    if warmup_iters < 0:
        raise UserError(f"param_scheduler got warmup_iters={warmup_iters}; expected at least 0")
    if warmup_iters and name == "constant":
        raise UserError(
            f"param_scheduler got warmup_iters={warmup_iters} with 'constant', which has no warm-up; use "
            "'constant_with_warmup'"
        )
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_iters, num_training_steps=num_iters)


@final
class StepOptimWrapper(OptimWrapper):
    """One optimizer step at a time: autocast, scaled backward, clipping, step. Reads nothing off the device.

    (With fp16 the loss scaler reads one value per step, unless the optimizer is fused.)

    Attributes:
        options: the config's `optimizer`, from which another of the same kind is built.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        precision: str,
        clip_grad: float | None,
        device: torch.device,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(optimizer)
        self.options = options
        self.precision = precision
        self.max_norm = clip_grad
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def autocast(self) -> AbstractContextManager:
        """The precision that `forward` runs in.

        Casts of weights are not cached: a forward pass uses each weight once, and with gradient checkpointing the
        cache alone would keep all of them to its end.
        """
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision], cache_enabled=False)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        self.scaler.scale(loss).backward(**kwargs)

    def step(self, **kwargs: Any) -> Tensor | None:
        """Clip, step, clear the gradients. Returns the norm before clipping, on the device; None without clipping."""
        norm = None
        if self.max_norm is not None:
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm
