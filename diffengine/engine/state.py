"""What of a run is saved, and how it is put back."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffengine.config import BUILDERS, PLAIN, REFERENCE, SECTIONS, resolve
from diffengine.engine import checkpoint
from diffengine.engine.loop import StepLoop
from diffengine.engine.optim import StepOptimWrapper, build_optimizer
from diffengine.errors import UserError
from diffengine.models.base import TrainableModel, describe
from diffengine.signatures import kinds_in, with_defaults

# Sections and options that a resumed run may change; anything else would make it another run than the one
# that was stopped.
FREE = {
    "max_epochs", "max_iters", "micro_batch_size", "num_workers", "skip_unreadable", "tf32", "compile",
    "work_dir", "default_hooks", "custom_hooks", "vis_backends", "token_cache",
}  # fmt: skip


def collect(runner: Any) -> dict[str, Any]:
    """The checkpoint of this moment. Tensors are the live ones: write it before the next step."""
    state = {
        "format": checkpoint.FORMAT,
        "name": runner.name,
        "config": json.dumps(runner.settings, ensure_ascii=False),
        "folder": str(Path.cwd()),
        "model": runner.trainable.trained_state(),
        "assets": dict(runner.trainable.assets),
        "optimizer": runner.optim_wrapper.optimizer.state_dict(),
        "param_scheduler": _schedule_state(runner.param_scheduler),
        "scaler": runner.optim_wrapper.scaler.state_dict(),
        "counters": {"iter": runner.train_loop.done, "epoch": runner.train_loop.epochs_done},
    }
    state["num_samples"] = runner.train_loop.num_samples
    if found := runner.train_loop.micro.state():
        state["micro_batch_size"] = found
    runner.call_hook("before_save_checkpoint", checkpoint=state)
    return state


# What a resume reads, and of which type it must be.
TYPES = {
    "name": str, "config": str, "model": dict, "assets": dict, "optimizer": dict, "param_scheduler": dict,
    "scaler": dict, "counters": dict, "num_samples": int,
}  # fmt: skip


def check_types(state: Mapping[str, Any], path: Path) -> None:
    """Check that a checkpoint has every entry that a resume reads, each of its type.

    Raises:
        UserError: what is missing or of another type.
    """
    problems = [
        f"'{name}' is {describe(state.get(name))}; expected {expected.__name__}"
        for name, expected in TYPES.items()
        if type(state.get(name)) is not expected
    ]
    if not problems and not all(type(text) is str for text in state["assets"].values()):
        problems.append("'assets' holds more than texts")
    _refuse(problems, path)


def check_fits(
    state: Mapping[str, Any],
    model: TrainableModel,
    optim: StepOptimWrapper,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    loop: StepLoop,
    path: Path,
) -> None:
    """Check all that `restore` puts back against the run that was built: names, shapes, dtypes, ranges.

    A fused optimizer step takes the shapes of its state on trust, and reads beyond a tensor that is too
    small. So this comes before anything is loaded or written.

    Raises:
        UserError: what does not fit.
    """
    model.check_trained_state(state["model"], f"checkpoint '{path}'")
    problems = _counter_problems(state, loop)
    _refuse(problems, path)
    steps = state["counters"]["iter"]
    problems += _optimizer_problems(state["optimizer"], optim, steps)
    saved = state["param_scheduler"]
    problems += differences(*_in_both(saved, _schedule_state(schedule)), "param_scheduler")
    if saved.get("last_epoch") != steps:
        problems.append(f"param_scheduler.last_epoch is {saved.get('last_epoch')}; expected {steps}, the steps taken")
    if optim.scaler.is_enabled() and state["scaler"]:
        problems += differences(state["scaler"], optim.scaler.state_dict(), "scaler")
    problems += _average_problems(state.get("ema"), model, steps)
    _refuse(problems, path)


def _refuse(problems: list[str], path: Path) -> None:
    if problems:
        raise UserError(
            f"cannot resume '{path}', which is damaged or was changed: {'; '.join(problems[:5])}; move it "
            "away, and use the one before"
        )


def _counter_problems(state: Mapping[str, Any], loop: StepLoop) -> list[str]:
    counters = state["counters"]
    steps, epoch = counters.get("iter"), counters.get("epoch")
    if type(steps) is not int or not 0 <= steps <= loop.max_iters:
        return [f"counters.iter is {steps!r}; expected 0 to {loop.max_iters}, the steps of this run"]
    passes = steps * loop.batch_size // loop.num_samples
    if type(epoch) is not int or not 0 <= epoch <= passes:
        return [f"counters.epoch is {epoch!r}; expected 0 to {passes} after {steps} steps"]
    micro = state.get("micro_batch_size", {"asked": None, "found": 1})
    asked, found = (micro.get("asked"), micro.get("found")) if isinstance(micro, dict) else (None, None)
    if type(asked) not in (int, type(None)) or type(found) is not int or not 1 <= found <= loop.batch_size:
        return [f"micro_batch_size is {micro!r}; expected 'asked', and 'found' from 1 to {loop.batch_size}"]
    return []


def _optimizer_problems(state: Mapping[str, Any], optim: StepOptimWrapper, steps: int) -> list[str]:
    """What of an optimizer's saved state does not fit its parameters."""
    groups, saved = optim.optimizer.state_dict()["param_groups"], state.get("state")
    saved_groups = state.get("param_groups")
    if not (isinstance(saved_groups, list) and len(saved_groups) == len(groups) and type(saved) is dict):
        return [f"optimizer has not the {len(groups)} param_groups and the state that it has in this run"]
    problems = []
    for number, (group, own) in enumerate(zip(saved_groups, groups)):
        where = f"optimizer.param_groups.{number}"
        if not isinstance(group, dict) or group.get("params") != own["params"] or "lr" not in group:
            return [f"{where} is not of the {len(own['params'])} parameters that it has in this run"]
        problems += differences(*_in_both(group, own), where)
    indices = [index for group in groups for index in group["params"]]
    if unknown := [key for key in saved if key not in indices]:
        return [f"optimizer.state has {unknown[0]!r}; expected numbers of parameters, 0 to {len(indices) - 1}"]
    expected: dict[str, Any] = {}
    for index, parameter in zip(indices, optim.parameters):
        if index in saved:
            like = describe(parameter)
            if like not in expected:
                expected[like] = state_after_a_step(parameter, optim.options)
            problems += differences(saved[index], expected[like], f"optimizer.state.{index}", steps=steps)
    return problems


def state_after_a_step(parameter: Tensor, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the optimizer of these options keeps of a parameter like this one, once it has taken a step."""
    copy = torch.zeros_like(parameter, requires_grad=True)
    copy.grad = torch.ones_like(copy)
    optimizer = build_optimizer(options, [{"params": [copy]}])
    optimizer.step()
    return optimizer.state_dict()["state"].get(0, {})


def _average_problems(ema: Any, model: TrainableModel, steps: int) -> list[str]:
    if ema is None:
        return []
    weights = {
        name: torch.empty_like(parameter, dtype=torch.float32, device="meta")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    problems = differences(ema, {"updates": 0, "weights": weights}, "ema")
    if not problems and not 0 <= ema["updates"] <= steps:
        problems.append(f"ema.updates is {ema['updates']}; expected 0 to {steps}, the steps taken")
    return problems


def differences(saved: Any, expected: Any, name: str, steps: int | None = None) -> list[str]:
    """Where `saved` has other names, types, shapes or dtypes than `expected`, or numbers that are not finite.

    Args:
        name: of the value, for messages.
        steps: the most that a value called "step" may be.
    """
    if isinstance(expected, Mapping):
        if not isinstance(saved, Mapping):
            return [f"{name} is {describe(saved)}; expected {describe(expected)}"]
        if saved.keys() != expected.keys():
            return [f"{name} has {sorted(map(str, saved))}; expected {sorted(map(str, expected))}"]
        return [
            problem
            for key, value in expected.items()
            for problem in differences(saved[key], value, f"{name}.{key}", steps=steps)
        ]
    if isinstance(expected, list | tuple):
        if not isinstance(saved, list | tuple) or len(saved) != len(expected):
            return [f"{name} is {describe(saved)}; expected {len(expected)} entries"]
        return [
            problem
            for index, (item, value) in enumerate(zip(saved, expected))
            for problem in differences(item, value, f"{name}.{index}", steps=steps)
        ]
    number = type(saved) in (int, float) and type(expected) in (int, float)
    if describe(saved) != describe(expected) and not number:
        return [f"{name} is {describe(saved)}; expected {describe(expected)}"]
    if number and not math.isfinite(saved):
        return [f"{name} is {saved}; expected a finite number"]
    if steps is not None and name.endswith(".step") and not 0 <= float(saved) <= steps:
        return [f"{name} is {float(saved):g}; expected 0 to {steps}, the steps taken"]
    return []


def _in_both(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[dict, dict]:
    """Both without what either lacks: another version of torch names more options, or fewer."""
    names = [name for name in expected if saved.get(name) is not None and expected[name] is not None]
    return {name: saved[name] for name in names}, {name: expected[name] for name in names}


def _schedule_state(schedule: torch.optim.lr_scheduler.LRScheduler) -> dict[str, Any]:
    """Without its functions, which the config makes again."""
    return {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"}


def restore(runner: Any, state: dict[str, Any], path: Path) -> None:
    """Put a checkpoint back into a run whose parts are built.

    Raises:
        UserError: the data has another size, so positions would be of other images.
    """
    if state["num_samples"] != runner.train_loop.num_samples:
        raise UserError(
            f"cannot resume '{path}': the data had {state['num_samples']} images and has "
            f"{runner.train_loop.num_samples}; restore it, or start a run of its own with --work-dir"
        )
    runner.trainable.load_trained_state(state["model"], f"checkpoint '{path}'")
    optimizer = runner.optim_wrapper.optimizer
    optimizer.load_state_dict(state["optimizer"])
    for values in optimizer.state.values():  # on a CPU these are the file itself, mapped: let go of it
        values.update({name: item.clone() for name, item in values.items() if isinstance(item, Tensor)})
    schedule = runner.param_scheduler
    known, _ = _in_both(state["param_scheduler"], _schedule_state(schedule))
    schedule.load_state_dict({**known, "lr_lambdas": [None] * len(schedule.lr_lambdas)})
    if state["scaler"]:
        runner.optim_wrapper.scaler.load_state_dict(state["scaler"])
    runner.train_loop.start_at(state["counters"]["iter"])
    runner.train_loop.micro.restore(state.get("micro_batch_size"))
    runner.call_hook("after_load_checkpoint", checkpoint=state)


def with_average(state: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A checkpoint whose trained parameters are its average.

    Raises:
        UserError: it has none.
    """
    if "ema" not in state:
        raise UserError(f"--ema: {source} keeps no average; train with EMAHook among custom_hooks, or leave out --ema")
    return {**state, "model": {**state["model"], **state["ema"]["weights"]}}


def check_same_run(state: dict[str, Any], settings: dict[str, Any], path: Path) -> None:
    """Refuse to resume a run under a config that would make it another one.

    What counts is what each part is given, the defaults of its class included: an option that only one of the
    two configs names is no change where it says what the class takes anyway.

    Raises:
        UserError: what differs, with both values.
    """
    saved = json.loads(state["config"])
    parts = [_parts(resolve(config)) for config in (saved, settings)]
    known = set(kinds_in(parts[1]))  # no other class is imported on a checkpoint's word
    before, now = (_flat(with_defaults(part, known)) for part in parts)
    written = {**_flat(saved), **_flat(settings)}
    changed = [
        f"{_setting(written.get(key)) or key} was {_spell(before, key)} and is {_spell(now, key)}"
        for key in dict.fromkeys([*before, *now])
        if (key in before, before.get(key)) != (key in now, now.get(key)) and not FREE & {*key.split(".")}
    ]
    if changed:
        raise UserError(
            f"cannot resume '{path}' under another config: {'; '.join(list(dict.fromkeys(changed))[:5])}; "
            "repeat the flags it was started with, or start a run of its own with --work-dir"
        )


def _parts(config: dict[str, Any]) -> dict[str, Any]:
    """The sections of a resolved config, each with what builds it; and what the engine reads as it is."""
    acting = {key: value for key, value in config.items() if key in SECTIONS | PLAIN.keys()}
    built = {name: {**config.get(name, {}), "type": builder} for name, builder in BUILDERS.items()}
    return {**PLAIN, **acting, **built}


def _flat(config: Any, path: str = "") -> dict[str, Any]:
    """Leaves by dotted path; a list of parts by their places."""
    if isinstance(config, list) and any(isinstance(item, dict) for item in config):
        config = {str(index): item for index, item in enumerate(config)}
    if isinstance(config, dict):
        return {name: leaf for key, value in config.items() for name, leaf in _flat(value, f"{path}.{key}").items()}
    return {path[1:]: config}


def _setting(leaf: Any) -> str | None:
    """The setting that stands here by its name alone."""
    found = REFERENCE.fullmatch(leaf) if isinstance(leaf, str) else None
    return found[1] if found else None


def _spell(leaves: dict[str, Any], key: str) -> str:
    return repr(leaves[key]) if key in leaves else "not set"
