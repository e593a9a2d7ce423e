"""The optimizer, its groups of parameters, its schedule, and the precision of a step."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, final

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from diffengine.engine.copies import Copies
from diffengine.engine.memory import device_memory
from diffengine.engine.mmengine_seam import OptimWrapper
from diffengine.engine.precision import DTYPES, Precision, resolve_precision
from diffengine.errors import UserError, require
from diffengine.models.base import TrainableModel
from diffengine.registry import build, resolve
from diffengine.text import did_you_mean, where

MEMORY_PER_COPY = 16  # bytes of the device's memory for each byte of copies
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(model: nn.Module, entries: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """The trained parameters in pairs of groups: with the optimizer's weight decay, and without.

    Matrices and kernels decay. Embeddings do not, and neither do parameters that are vectors once axes of size 1 are
    dropped: norms, biases, and GRN's gamma and beta of shape (1,1,1,C), which names alone would miss.

    Args:
        entries: `param_groups` of `build_optim_wrapper`. The first pair is of what none of them matches.

    Raises:
        UserError: an entry is the first to match of no trained parameter.
    """
    pairs: list[dict[bool, list[nn.Parameter]]] = [{True: [], False: []} for _ in range(1 + len(entries))]
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for last, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                decays = not isinstance(module, nn.Embedding) and parameter.squeeze().ndim >= 2
                matching = [number for number, entry in enumerate(entries, 1) if fnmatchcase(last, entry["match"])]
                pairs[min(matching, default=0)][decays].append(parameter)
    for number, (entry, pair) in enumerate(zip(entries, pairs[1:])):
        if not pair[True] + pair[False]:
            raise UserError(f"param_groups.{number} got match='{entry['match']}', {_why_no_match(entry, model)}")
    groups = []
    for entry, pair in zip(({}, *entries), pairs):
        options = {key: value for key, value in entry.items() if key != "match"}
        groups += [{**options, "params": pair[True]}, {**options, "params": pair[False], "weight_decay": 0.0}]
    return groups


def _why_no_match(entry: Mapping[str, Any], model: nn.Module) -> str:
    """Why an entry of `param_groups` gets no parameter, and what to do."""
    names = list(trained_parameters(model))
    if any(fnmatchcase(name, entry["match"]) for name in names):
        return "and entries before it match all of its parameters; the first match wins, so move it up"
    components = dict.fromkeys(f"{name.partition('.')[0]}.*" for name in names)
    hint = did_you_mean(entry["match"], [*components, *names])
    return f"which no trained parameter matches{hint or f'; they have names such as {names[0]}'}"


def _check_groups(
    optimizer: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]],
    device: torch.device,
) -> None:  # fmt: skip
    """Refuse options that groups cannot have: the optimizer is built and stepped for one number per group."""
    numbers = [torch.zeros(1, device=device, requires_grad=True) for _ in groups]
    for index, entry in enumerate(entries):
        options = {key: value for key, value in entry.items() if key != "match"}
        alone = build_optimizer({**optimizer, **options}, [{"params": numbers[:1]}])  # its class checks the values
        shared = [key for key in options if key not in alone.defaults or key in ("fused", "foreach")]
        advice = f"which {optimizer['type']} has for all parameters together; set it in optim_wrapper.optimizer"
        require(not shared, f"param_groups.{index} got {', '.join(shared)}, {advice}")
    built = build_optimizer(optimizer, [{**group, "params": [number]} for group, number in zip(groups, numbers)])
    for number in numbers:
        number.grad = torch.ones_like(number)
    try:
        built.step()
    except Exception as error:  # of any package
        raise UserError(f"optimizer {optimizer['type']} cannot train these param_groups: {where(error)}") from error


def describe_groups(entries: Sequence[Mapping[str, Any]], optimizer: Optimizer) -> list[str]:
    """A line for each entry of `param_groups`: what it matched, and its rate."""
    lines = []
    for number, entry in enumerate(entries, 1):
        groups = optimizer.param_groups[2 * number : 2 * number + 2]
        sizes = [parameter.numel() for group in groups for parameter in group["params"]]
        rate = groups[0].get("initial_lr", groups[0]["lr"])
        lines.append(f"'{entry['match']}': {len(sizes)} tensors, {sum(sizes):,} parameters, lr {rate:g}")
    return lines


def build_optimizer(optimizer: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> Optimizer:
    """Build any torch-style optimizer from `dict(type=AdamW, lr=...)`, for groups as of `parameter_groups`.

    Those that can on every device are fused: one kernel for all parameters.
    """
    options, name = dict(optimizer), f"optimizer {optimizer['type']}"
    if resolve(options["type"]) in FUSED and options.get("fused") is None and not options.get("foreach"):
        options["fused"] = True
    try:
        with redirect_stdout(io.StringIO()):  # Prodigy prints what it was given
            built = build(options, params=list(groups))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    require(isinstance(built, Optimizer), f"{name} is no torch.optim.Optimizer; choose one")
    for lr in (group.get("lr") for group in built.param_groups):
        advice = "expected a number, which the schedule changes (Adafactor: set lr and relative_step=False)"
        require(isinstance(lr, int | float), f"{name} got lr={lr}; {advice}")
    if is_schedule_free(built):
        built.train()
    return built


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Whether an optimizer trains other weights than are to be used, and changes between them by train() and eval()."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def build_optim_wrapper(
    optimizer: dict, precision: Precision = "auto", clip_grad: float | None = None,
    param_groups: list[dict] | None = None, cast_once: bool | Literal["auto"] = "auto", *, model: TrainableModel,
    kept: str | None = None,
) -> "StepOptimWrapper":  # fmt: skip
    """The `optim_wrapper` section.

    Args:
        optimizer: `dict(type=AdamW, lr=..., weight_decay=...)`, any torch-style optimizer class.
        precision: of autocast over fp32 weights, see `resolve_precision` and, for "auto" on a CPU, `measure`.
        clip_grad: the largest norm of all gradients together; None for no limit.
        param_groups: `[dict(match="text_encoder.*", lr=1e-5), ...]`: other options of the optimizer for the trained
            parameters whose name, "component.parameter", matches a pattern of `fnmatch` (`*`, `?`, `[...]`; `*`
            matches dots, too). The first match wins. The schedule scales each group's own rate.
        cast_once: in bf16 and fp16, keep copies of trained weights that are cast once per step instead of at each use:
            the same bits, faster, for 2 bytes a weight. "auto": if these are at most a sixteenth of the device's
            memory, so that weights, gradients and AdamW's state (16 bytes a weight) take at most half of it.
        model, kept: given by the run; the last one is the precision that a resumed run had.
    """
    require(clip_grad is None or clip_grad > 0, f"clip_grad got {clip_grad}; expected a number above 0, or None")
    device = next(model.parameters()).device
    split = parameter_groups(model, param_groups or ())
    if param_groups:
        _check_groups(optimizer, param_groups, split, device)
    built = build_optimizer(optimizer, split)
    groups = {parameter: model.gradient_group(name) for name, parameter in trained_parameters(model).items()}
    copies = Copies(model)
    if cast_once == "auto":
        cast_once = 2 * copies.weights <= device_memory() / MEMORY_PER_COPY
    choice = resolve_precision(precision, device, kept)
    return StepOptimWrapper(built, choice, clip_grad, device, optimizer, groups, copies if cast_once else None)


def build_param_scheduler(
    name: Schedule = "constant", warmup_iters: int = 0, *, optimizer: Optimizer, num_iters: int
) -> LRScheduler:
    """The `param_scheduler` section: diffusers' schedules by name, counted in optimizer steps.

    Args:
        name: as `--lr_scheduler` of diffusers' training scripts.
        warmup_iters: steps in which the rate rises from 0 (every schedule but "constant").
        optimizer, num_iters: given by the run.
    """
    got = f"param_scheduler got warmup_iters={warmup_iters}"
    require(warmup_iters >= 0, f"{got}; expected at least 0")
    allowed = name != "constant" or warmup_iters == 0
    require(allowed, f"{got} with 'constant', which has no warm-up; use 'constant_with_warmup'")
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_iters, num_training_steps=num_iters)


class Norms(NamedTuple):
    """Norms of a step's gradients before clipping, on the device."""

    total: Tensor  # scalar, of all gradients
    good: Tensor  # scalar bool: whether `total` is finite; else the step is skipped
    groups: Tensor | None  # (groups,), in the order of `StepOptimWrapper.groups`; None for a model with one group


def clip(parameters: Sequence[nn.Parameter], max_norm: float | None) -> tuple[Tensor, Tensor, list[int]]:
    """`torch.nn.utils.clip_grad_norm_`, bit for bit, which keeps the norm of each gradient. None: no limit.

    Returns:
        The norm of all gradients, the norms (N,) of single ones, and the indices of the parameters that have one.
    """
    indices = [index for index, parameter in enumerate(parameters) if parameter.grad is not None]
    norms_N = torch.stack(torch._foreach_norm([parameters[index].grad for index in indices]))
    total = torch.linalg.vector_norm(norms_N)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total, foreach=True)
    return total, norms_N, indices


@final
class StepOptimWrapper(OptimWrapper):
    """One optimizer step at a time: autocast, scaled backward, clipping, step. Reads nothing off the device.

    (An optimizer that is not fused reads one value per step, and so does the first step; see `_take`.) `choice` is of
    `resolve_precision`, `options` the config's `optimizer`, from which another of the same type can be built.
    `group_of` names each parameter's group; `copies` is None if weights are cast at each use.
    """

    def __init__(
        self, optimizer: Optimizer, choice: tuple[str, str], clip_grad: float | None, device: torch.device,
        options: dict, group_of: Mapping[nn.Parameter, str], copies: Copies | None = None,
    ) -> None:  # fmt: skip
        super().__init__(optimizer)
        self.precision, self.why = choice
        self.max_norm, self.device, self.options, self.copies = clip_grad, device, options, copies
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.groups = list(dict.fromkeys(group_of.values()))  # whose gradients' norms are logged
        self._numbers = [self.groups.index(group_of[parameter]) for parameter in self.parameters]
        self._last: tuple[list[int], Any] = ([], None)  # the last step's `indices`, and their groups on the device
        self._taken = False  # whether the optimizer has taken a step in this process

    @property
    def schedule_free(self) -> bool:
        """Whether the weights that are trained are not those to be used."""
        return is_schedule_free(self.optimizer)

    @contextmanager
    def eval_weights(self) -> Iterator[None]:
        """Inside, the model has the weights to be used: a schedule-free optimizer's average, else those it has.

        The optimizer changes copies, since eval() and then train() would not give back every bit.
        """
        if not self.schedule_free:
            yield
            return
        optimizer: Any = self.optimizer
        live = [parameter.data for parameter in self.parameters]
        groups = [dict(group) for group in optimizer.param_groups]  # which hold the mode
        try:
            for parameter in self.parameters:
                parameter.data = parameter.data.clone()
            optimizer.eval()
            yield
        finally:
            for parameter, data in zip(self.parameters, live):
                parameter.data = data
            for group, before in zip(optimizer.param_groups, groups):
                group.update(before)

    def cast_weights(self) -> AbstractContextManager:
        """Inside, layers compute with weights as these are now, cast once; around the passes of a step or a preview."""
        if self.precision == "fp32" or self.copies is None:
            return nullcontext()
        return self.copies.used(DTYPES[self.precision])

    def autocast(self) -> AbstractContextManager:
        """The precision of `forward`. torch caches no casts: gradient checkpointing would keep them all."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision], cache_enabled=False)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Add a loss's gradients. One that is not finite makes them NaN, which spreads to all ranks."""
        self.scaler.scale(loss).backward(1 + 0 * loss.detach(), **kwargs)

    def step(self, **kwargs: Any) -> Norms:
        """Clip, step unless gradients are not finite, clear them. Returns the norms before clipping."""
        self.scaler.unscale_(self.optimizer)
        total, norms_N, indices = clip(self.parameters, self.max_norm)
        groups = self._by_group(norms_N, indices) if len(self.groups) > 1 else None
        norms = Norms(total, total.isfinite(), groups)
        self._take(norms.good)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norms

    def _take(self, good: Tensor) -> None:
        """Step the optimizer if `good`, a scalar on the device; else its state and the weights stay as they are.

        A fused kernel decides on the device, as with torch's GradScaler. Other optimizers need the host to decide. So
        does the first step, in which an optimizer allocates its state: a skipped one leaves SGD's uninitialized.
        """
        optimizer: Any = self.optimizer
        if self._taken and getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = (~good).float()
            optimizer.step()
            del optimizer.found_inf
        elif good.item():
            optimizer.step()
            self._taken = True
        else:
            optimizer._opt_called = True  # else torch's schedules warn that they are stepped first

    def _by_group(self, norms_N: Tensor, indices: list[int]) -> Tensor:
        """Norms (groups,) from the norms of single gradients and the indices of their parameters."""
        if indices != self._last[0]:  # a parameter may have no gradient in some steps
            numbers = [self._numbers[index] for index in indices]
            self._last = indices, torch.tensor(numbers, device=norms_N.device)
        return norms_N.new_zeros(len(self.groups)).index_add_(0, self._last[1], norms_N.square()).sqrt_()
