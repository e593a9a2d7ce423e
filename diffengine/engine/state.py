"""What a checkpoint holds: collected from a run, judged, and put back into a run or a model."""

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from diffengine.config import GIVEN, PLAIN, REFERENCE, SECTIONS, Plain, plain, resolve, substitute
from diffengine.engine import checkpoint
from diffengine.engine.build import BUILDERS, Training, choose_guidance
from diffengine.engine.optim import StepOptimWrapper, build_optimizer, trained_parameters
from diffengine.engine.precision import DTYPES
from diffengine.engine.step import COUNTS
from diffengine.errors import UserError, require
from diffengine.models import trusted_classes
from diffengine.models.base import TrainableModel, describe
from diffengine.registry import resolve as resolve_type
from diffengine.signatures import defaults_of, problems_of, types_in, with_defaults

if TYPE_CHECKING:
    from diffengine.engine.run import Run

# Options that a resumed run may change; any other change would make it another run than the one that was stopped.
FREE = {
    "max_epochs", "max_iters", "micro_batch_size", "num_workers", "skip_unreadable", "tf32", "compile", "cast_once",
    "work_dir",
    "default_hooks", "custom_hooks", "vis_backends", "token_cache",
}  # fmt: skip

# The entries of every checkpoint but "format" and "folder", and their types.
TYPES = {
    "name": str, "config": str, "model": dict, "assets": dict, "optimizer": dict, "param_scheduler": dict,
    "scaler": dict, "counters": dict, "num_samples": int,
}  # fmt: skip


def collect(run: "Run") -> dict[str, Any]:
    """The checkpoint of this moment. Its tensors are the live ones: write it before the next step."""
    with run.optim_wrapper.eval_weights():
        weights = run.trainable.trained_state()
    state = {
        "format": checkpoint.FORMAT,
        "name": run.name,
        "config": json.dumps(run.config, ensure_ascii=False),
        "folder": str(Path.cwd()),
        "model": weights,
        "assets": dict(run.trainable.assets),
        "optimizer": run.optim_wrapper.optimizer.state_dict(),
        "param_scheduler": _schedule_state(run.param_scheduler),
        "scaler": run.optim_wrapper.scaler.state_dict(),
        "counters": {"iter": run.clock.done, "epoch": run.clock.epochs_done},
        "num_samples": run.clock.num_samples,
        "precision": run.optim_wrapper.precision,
    }
    if run.optim_wrapper.schedule_free:  # `model` has the weights to be used, and training continues from these
        trained = trained_parameters(run.trainable)
        state["train_weights"] = {name: parameter.detach() for name, parameter in trained.items()}
    if found := run.train_loop.micro.state():
        state["micro_batch_size"] = found
    run.call_hook("before_save_checkpoint", checkpoint=state)
    return state


def _schedule_state(schedule: LRScheduler) -> dict[str, Any]:
    """Without its functions, which the config makes again."""
    return {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"}


def read_whole(path: Path) -> dict[str, Any]:
    """Read a checkpoint; a UserError unless its checksums and the names and types of its entries are right."""
    state = checkpoint.read(path)
    checkpoint.verify(path)
    _refuse(_entry_problems(state), path)
    return state


def _entry_problems(state: Mapping[str, Any]) -> list[str]:
    """What is wrong with the names and types of a checkpoint's entries."""
    wrong = {name: expected.__name__ for name, expected in TYPES.items() if type(state.get(name)) is not expected}
    if wrong:
        got = {name: describe(state[name]) if name in state else "missing" for name in wrong}
        return [f"'{name}' is {got[name]}; expected {expected}" for name, expected in wrong.items()]
    problems = []
    for name in ("iter", "epoch"):
        count = state["counters"].get(name)
        if type(count) is not int or count < 0:
            problems.append(f"counters.{name} is {count!r}; expected a whole number from 0")
    if not all(type(text) is str for item in state["assets"].items() for text in item):
        problems.append("'assets' holds more than texts")
    try:
        config = plain(json.loads(state["config"]), "'config'")
    except (UserError, ValueError, RecursionError):
        config = None
    model = config.get("model") if isinstance(config, dict) else None
    seed = config.get("seed") if isinstance(model, dict) else None
    if not (isinstance(model, dict) and type(model.get("type")) is str and type(seed) is int and abs(seed) < 2**63):
        problems.append("'config' is not the JSON of a config with a model and a seed")
    if (precision := state.get("precision", "fp32")) not in ("fp32", *DTYPES):
        problems.append(f"precision is {precision!r}; expected fp32, bf16 or fp16")
    average = state.get("ema", {"weights": {}})
    if not (isinstance(average, dict) and isinstance(average.get("weights"), dict)):
        problems.append("'ema' holds no weights by name")
        average = {"weights": {}}
    live = state.get("train_weights", {})
    if not isinstance(live, dict):
        problems.append("'train_weights' holds no weights by name")
        live = {}
    if not all(type(name) is str for name in (*average["weights"], *live, *state["model"])):
        problems.append("weights are not all named by texts")
    for name, tensor in (*average["weights"].items(), *live.items(), *state["model"].items()):
        if isinstance(tensor, Tensor) and not _is_finite(tensor):
            problems.append(f"{name} holds values that are not finite")
    return problems


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def restore(run: "Run", state: Mapping[str, Any], path: Path) -> None:
    """Put a checkpoint back into a run that is built, and that it fits (`check_fits`)."""
    run.trainable.load_trained_state(_training_state(state), f"checkpoint '{path}'")
    optim, schedule, steps = run.optim_wrapper, run.param_scheduler, state["counters"]["iter"]
    _restore_optimizer(optim, state["optimizer"])
    own, rates = _schedule_state(schedule), [group["lr"] for group in optim.optimizer.param_groups]
    taken = {"last_epoch": steps, "_step_count": own["_step_count"] + steps, "_last_lr": rates}
    schedule.load_state_dict({**own, **taken, "lr_lambdas": [None] * len(schedule.lr_lambdas)})
    if state["scaler"]:
        optim.scaler.load_state_dict(state["scaler"])
    run.train_loop.start_at(steps)
    run.train_loop.micro.restore(state.get("micro_batch_size"))
    run.call_hook("after_load_checkpoint", checkpoint=state)


def _training_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's weights and buffers that training continues from."""
    return {**state["model"], **state.get("train_weights", {})}


def _restore_optimizer(optim: StepOptimWrapper, saved: Mapping[str, Any]) -> None:
    """Put back an optimizer's state, and of its groups what training changes; the options are the config's."""
    own = optim.optimizer.state_dict()["param_groups"]
    groups = [
        {**group, **{name: was[name] for name in _changing(group, optim) if name in was}}
        for group, was in zip(own, saved["param_groups"])
    ]
    optim.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    for values in optim.optimizer.state.values():  # on a CPU these are the mapped file itself: let go of it
        values.update({name: item.clone() for name, item in values.items() if isinstance(item, Tensor)})


def _changing(group: Mapping[str, Any], optim: StepOptimWrapper) -> set[str]:
    """The values of a parameter group that training changes: the rate, and what is no option of the optimizer."""
    options = {*defaults_of(resolve_type(str(optim.options["type"]))), *optim.options, "params", "initial_lr"}
    return {"lr", *(group.keys() - options)}


def check_same_run(state: Mapping[str, Any], config: Plain, path: Path) -> None:
    """Refuse to resume under a config that would make another run of it, with what differs and both values.

    What counts is what each class gets, its defaults included: an option that only one of the two configs names is no
    change if it has the default's value.
    """
    saved = json.loads(state["config"])
    known = set(types_in(resolve(config)))  # no other class is imported on a checkpoint's word
    before, now = _leaves(_acting(resolve(saved), known)), _leaves(_acting(resolve(config), known))
    written = {**_leaves(saved), **_leaves(config)}
    changed = []
    for key in dict.fromkeys([*before, *now]):
        if (key in before, before.get(key)) != (key in now, now.get(key)) and not FREE & {*key.split(".")}:
            reference = REFERENCE.fullmatch(str(written.get(key)))
            was, is_now = (repr(leaves[key]) if key in leaves else "not set" for leaves in (before, now))
            changed.append(f"{reference[1] if reference else key} was {was} and is {is_now}")
    first = "; ".join(list(dict.fromkeys(changed))[:5])
    advice = "repeat the flags it was started with, or start another run with --work-dir"
    require(not changed, f"cannot resume '{path}' under another config: {first}; {advice}")


def _acting(resolved: Plain, known: set[str]) -> Plain:
    """The sections of a resolved config with the defaults of what they configure, and the plain settings."""
    sections = {key: with_defaults(value, known) for key, value in resolved.items() if key in {*SECTIONS, *PLAIN}}
    built = {name: {**defaults_of(builder), **sections.get(name, {})} for name, builder in BUILDERS.items()}
    return {**PLAIN, **sections, **built}


def _leaves(config: Any, path: str = "") -> dict[str, Any]:
    """The values of a config by dotted path; lists of dicts by index."""
    if isinstance(config, list) and any(isinstance(item, dict) for item in config):
        config = {str(index): item for index, item in enumerate(config)}
    if isinstance(config, dict):
        return {name: leaf for key, value in config.items() for name, leaf in _leaves(value, f"{path}.{key}").items()}
    return {path[1:]: config}


def check_fits(state: Mapping[str, Any], path: Path, training: Training) -> None:
    """Check everything that `restore` puts back against the run: names, shapes, dtypes, ranges.

    A fused optimizer step takes the shapes of its state on trust and reads beyond a tensor that is too small. So this
    comes before anything is loaded or written.
    """
    model, loop, optim, schedule, _ = training
    clock, had = loop.clock, state["num_samples"]
    data = f"the data had {had} images and has {clock.num_samples}; restore it, or start another run with --work-dir"
    require(had == clock.num_samples, f"cannot resume '{path}': {data}")
    model.check_trained_state(_training_state(state), f"checkpoint '{path}'")
    steps, epoch = state["counters"].get("iter"), state["counters"].get("epoch")
    _refuse(_count_problems("counters.iter", steps, clock.max_iters, ", the steps of this run"), path)
    passes = steps * clock.batch_size // clock.num_samples
    problems = _count_problems("counters.epoch", epoch, passes, f" after {steps} steps")
    micro = state.get("micro_batch_size", {"asked": None, "found": 1})
    known = isinstance(micro, dict) and micro.keys() == {"asked", "found"}
    asked, found = (micro["asked"], micro["found"]) if known else (None, None)
    if type(asked) not in (int, type(None)) or type(found) is not int or not 1 <= found <= clock.batch_size:
        problems.append(f"micro_batch_size is {micro!r}; expected 'asked', and 'found' from 1 to {clock.batch_size}")
    problems += _optimizer_problems(state["optimizer"], optim, steps)
    if state.get("train_weights", {}).keys() != (trained_parameters(model).keys() if optim.schedule_free else set()):
        problems.append("'train_weights' has not the names that the optimizer trains")
    problems += differences(*_in_both(state["param_scheduler"], _schedule_state(schedule)), "param_scheduler")
    if (last := state["param_scheduler"].get("last_epoch")) != steps:
        problems.append(f"param_scheduler.last_epoch is {last}; expected {steps}, the steps taken")
    if optim.scaler.is_enabled() and state["scaler"]:
        problems += scaler_problems(state["scaler"], optim.scaler.state_dict())
    if "ema" in state:
        trained = trained_parameters(model)
        weights = {name: torch.empty_like(item, dtype=torch.float32, device="meta") for name, item in trained.items()}
        unlike = differences(state["ema"], {"updates": 0, "weights": weights}, "ema")
        problems += unlike or _count_problems("ema.updates", state["ema"]["updates"], steps, ", the steps taken")
    if "metrics" in state:
        problems += _window_problems(state["metrics"])
    _refuse(problems, path)


def _window_problems(saved: Any) -> list[str]:
    """What in a saved `Window` does not fit together."""
    widths, counts = (saved.get("widths"), saved.get("counts")) if isinstance(saved, dict) else (None, None)
    if not (isinstance(widths, dict) and all(type(width) is int and width > 0 for width in widths.values())):
        return [f"metrics.widths is {widths!r}; expected columns by name"]
    if not (isinstance(counts, list) and all(isinstance(row, list) and len(row) >= len(COUNTS) for row in counts)):
        return [f"metrics.counts is {describe(counts)}; expected rows of {len(COUNTS)} numbers or more"]
    expected = {
        "widths": widths,
        "rows": torch.empty(len(counts), sum(widths.values()), device="meta"),
        "counts": [[0] * max(map(len, counts))] * len(counts) if counts else [],
        **dict.fromkeys(("waited", "seconds", "bad_in_a_row"), 0),
    }
    return differences(saved, expected, "metrics")


def _refuse(problems: list[str], path: Path) -> None:
    found = "; ".join(problems[:5])
    require(not problems, f"checkpoint '{path}' is damaged or was changed: {found}; {checkpoint.MOVE}")


def _count_problems(name: str, count: Any, most: int, why: str) -> list[str]:
    """A problem, unless `count` is an int from 0 to `most`."""
    return [] if type(count) is int and 0 <= count <= most else [f"{name} is {count!r}; expected 0 to {most}{why}"]


def _optimizer_problems(state: Mapping[str, Any], optim: StepOptimWrapper, steps: int) -> list[str]:
    """What in an optimizer's saved state does not fit its parameters."""
    groups = optim.optimizer.state_dict()["param_groups"]
    saved_groups, saved = state.get("param_groups"), state.get("state")
    if not (isinstance(saved_groups, list) and len(saved_groups) == len(groups) and type(saved) is dict):
        return [f"optimizer has not the {len(groups)} param_groups and the state that it has in this run"]
    problems = []
    for number, (group, own) in enumerate(zip(saved_groups, groups)):
        name = f"optimizer.param_groups.{number}"
        if not isinstance(group, dict) or group.get("params") != own["params"] or "lr" not in group:
            return [f"{name} is not of the {len(own['params'])} parameters that it has in this run"]
        problems += differences(*_in_both(group, own), name) or _group_problems(group, own, optim, name)
    indices = [index for group in groups for index in group["params"]]
    if unknown := [key for key in saved if key not in indices]:
        return [f"optimizer.state has {unknown[0]!r}; expected 0 to {len(indices) - 1}, one a parameter"]
    numbers = [number for number, group in enumerate(groups) for _ in group["params"]]

    @cache
    def expected(number: int, shape: tuple, strides: tuple, dtype: torch.dtype, value: int) -> dict[str, Any]:
        like = torch.empty_strided(shape, strides, dtype=dtype, device=optim.device).fill_(value)
        return state_after_a_step(like, optim.options, groups[number])

    for index, number, parameter in zip(indices, numbers, optim.parameters):
        if saved.get(index, {}) != {}:  # empty before the first step of a schedule-free optimizer
            like, name = (number, parameter.shape, parameter.stride(), parameter.dtype), f"optimizer.state.{index}"
            wrong = differences(saved[index], expected(*like, 0), name, steps)
            if wrong and differences(saved[index], expected(*like, 1), name, steps):  # Prodigy keeps less of zeros
                problems += wrong
    return problems


def _group_problems(group: Mapping[str, Any], own: Mapping[str, Any], optim: StepOptimWrapper, name: str) -> list[str]:
    """Which options of a saved parameter group are not the config's, and a rate that no schedule sets."""
    fixed = own.keys() - _changing(own, optim) - {"params"}
    saved, expected = _in_both(*({key: values.get(key) for key in sorted(fixed)} for values in (group, own)))
    text = "{}.{} is {!r}; expected {!r}, as in the config"
    other = [text.format(name, key, saved[key], expected[key]) for key in saved if saved[key] != expected[key]]
    rate, most = group["lr"], own.get("initial_lr", own["lr"])
    if not 0 <= rate <= most * (1 + 1e-6):
        other.append(f"{name}.lr is {rate!r}; expected 0 to {most}")
    return other


def scaler_problems(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """What in a loss scaler's saved state cannot have come about in this run."""
    if problems := differences(saved, own, "scaler"):
        return problems
    fixed = {**own, "scale": saved["scale"], "_growth_tracker": saved["_growth_tracker"]}
    fine = saved == fixed and saved["scale"] > 0 and 0 <= saved["_growth_tracker"] < own["growth_interval"]
    return [] if fine else [f"scaler is {dict(saved)}; expected a scale above 0, and the rest as in {dict(own)}"]


def state_after_a_step(
    parameter: Tensor, options: Mapping[str, Any], group: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What the optimizer of these options stores for a parameter of this value, in `group`, after a step."""
    copy = parameter.detach().clone().requires_grad_()
    copy.grad = torch.ones_like(copy)
    optimizer = build_optimizer(options, [{**(group or {}), "params": [copy]}])
    optimizer.step()
    return optimizer.state_dict()["state"].get(0, {})


def differences(saved: Any, expected: Any, name: str, steps: int | None = None) -> list[str]:
    """What in `saved` has other names, types, shapes or dtypes than in `expected`, or numbers that are not finite.

    Problems call the value `name`; `steps` is the most that a value called "step" may be.
    """
    if isinstance(expected, list | tuple):
        if not isinstance(saved, list | tuple) or len(saved) != len(expected):
            return [f"{name} is {describe(saved)}; expected {len(expected)} entries"]
        saved, expected = dict(enumerate(saved)), dict(enumerate(expected))
    if isinstance(expected, Mapping) and isinstance(saved, Mapping):
        if saved.keys() != expected.keys():
            return [f"{name} has {sorted(map(str, saved))}; expected {sorted(map(str, expected))}"]
        return [text for key in expected for text in differences(saved[key], expected[key], f"{name}.{key}", steps)]
    number = type(saved) in (int, float) and type(expected) in (int, float)
    if describe(saved) != describe(expected) and not number:
        return [f"{name} is {describe(saved)}; expected {describe(expected)}"]
    if isinstance(saved, Tensor) and saved.stride() != expected.stride():
        return [f"{name} has the strides {saved.stride()}; expected {expected.stride()}"]
    infinite = number and not math.isfinite(saved) and saved != expected
    if infinite or (isinstance(saved, Tensor) and not _is_finite(saved)):
        return [
            f"{name} is not finite" if isinstance(saved, Tensor) else f"{name} is {saved}; expected a finite number"
        ]
    if steps is not None and name.endswith(".step") and not 0 <= float(saved) <= steps:
        return [f"{name} is {float(saved):g}; expected 0 to {steps}, the steps taken"]
    return []


def _in_both(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[dict, dict]:
    """Both without what either lacks: another version of torch names more options, or fewer."""
    names = [name for name in expected if saved.get(name) is not None and expected[name] is not None]
    return {name: saved[name] for name in names}, {name: expected[name] for name in names}


def load_model(path: Path, given: Plain | None = None, average: bool = False) -> TrainableModel:
    """The model of a checkpoint, with its weights, on the host. The whole checkpoint is verified first.

    Args:
        given: the user's config, whose classes are trusted; None if there is none.
        average: take the averaged weights.

    Raises:
        UserError: the checkpoint is damaged, names a class that is not trusted, keeps no average, or does not fit.
    """
    state, source = read_whole(path), f"checkpoint '{path}'"
    if average:
        advice = "train with EMAHook among custom_hooks, or leave out --ema"
        require("ema" in state, f"--ema: {source} keeps no average; {advice}")
        state = {**state, "model": {**state["model"], **state["ema"]["weights"]}}
    model = model_of(state, trusted_config(state, given, source), source)
    lacking = [name for name in trained_parameters(model) if average and name not in state["ema"]["weights"]]
    require(not lacking, f"{source} keeps no average of {', '.join(lacking[:3])}; leave out --ema")
    return model


def trusted_config(state: Mapping[str, Any], given: Plain | None, source: str) -> Plain:
    """Resolve the config that a checkpoint carries, and judge it before any class that it names is imported.

    A checkpoint is data. A class that its resolved config names is used only if it is on a closed list, or if the
    config that the user names (`given`, with its references) uses it too. Errors name the `source`.
    """
    own, trusted = resolve(json.loads(state["config"])), {*trusted_classes()}
    if given is not None:
        theirs = substitute(given)["model"]
        own_type, other = own["model"].get("type"), theirs.get("type")
        different, advice = f"got {own_type}, the config has {other}", "use the config it was trained with"
        require(own_type == other, f"{source} is of another model: {different}; {advice} ('{state['name']}')")
        trusted |= {*types_in(theirs)}
    for name in types_in(own["model"]):
        advice = "which is not run on a checkpoint's word; give the CONFIG that uses it"
        require(name in trusted, f"{source} names the class '{name}', {advice}")
    return own


def model_of(state: Mapping[str, Any], resolved: Plain, source: str) -> TrainableModel:
    """Build the model of a resolved config and load a checkpoint's weights, on the host. Errors name the `source`."""
    options = {key: value for key, value in resolved["model"].items() if key != "type"}
    cls = resolve_type(resolved["model"]["type"])
    if not (isinstance(cls, type) and issubclass(cls, TrainableModel)):
        raise UserError(f"{source} names '{resolved['model']['type']}', which is no TrainableModel")
    problems = problems_of(resolved["model"], "model", GIVEN["model"])
    require(not problems, f"{source} holds a config that builds no model: {'; '.join(problems[:5])}")
    try:
        model = cls(**options, assets=state["assets"], seed=resolved["seed"])
    except UserError as error:
        folder = state.get("folder")
        if folder in (None, str(Path.cwd())):
            raise
        start = f"was trained in '{folder}', where relative paths in its config start"
        raise UserError(f"{error}; {source} {start}: go there, and try again") from error
    choose_guidance(model, resolved)
    model.load_trained_state(state["model"], source)
    return model.eval()
