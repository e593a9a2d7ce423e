"""What of a run is saved, and how it is put back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffengine.config import BUILDERS, PLAIN, REFERENCE, SECTIONS, resolve
from diffengine.engine import checkpoint
from diffengine.errors import UserError
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
        "param_scheduler": {
            key: value for key, value in runner.param_scheduler.state_dict().items() if key != "lr_lambdas"
        },
        "scaler": runner.optim_wrapper.scaler.state_dict(),
        "counters": {"iter": runner.train_loop.done, "epoch": runner.train_loop.epochs_done},
    }
    state["num_samples"] = runner.train_loop.num_samples
    if found := runner.train_loop.micro.state():
        state["micro_batch_size"] = found
    runner.call_hook("before_save_checkpoint", checkpoint=state)
    return state


def restore(runner: Any, state: dict[str, Any], path: Path) -> None:
    """Put a checkpoint back into a run whose parts are built.

    Raises:
        UserError: the data has another size, so positions would be of other pictures; or weights do not fit.
    """
    if state["num_samples"] != runner.train_loop.num_samples:
        raise UserError(
            f"cannot resume '{path}': the data had {state['num_samples']} pictures and has "
            f"{runner.train_loop.num_samples}; restore it, or start a run of its own with --work-dir"
        )
    runner.trainable.load_trained_state(state["model"], f"checkpoint '{path}'")
    optimizer = runner.optim_wrapper.optimizer
    optimizer.load_state_dict(state["optimizer"])
    for values in optimizer.state.values():  # on a CPU these are the file itself, mapped: let go of it
        values.update({name: item.clone() for name, item in values.items() if isinstance(item, Tensor)})
    schedule = runner.param_scheduler
    schedule.load_state_dict({**state["param_scheduler"], "lr_lambdas": [None] * len(schedule.lr_lambdas)})
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
        raise UserError(
            f"--ema: {source} keeps no average; train with EMAHook among custom_hooks, or leave out --ema"
        )
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
        config = {str(place): item for place, item in enumerate(config)}
    if isinstance(config, dict):
        return {
            name: leaf
            for key, value in config.items()
            for name, leaf in _flat(value, f"{path}.{key}").items()
        }
    return {path[1:]: config}


def _setting(leaf: Any) -> str | None:
    """The setting that stands here by its name alone."""
    found = REFERENCE.fullmatch(leaf) if isinstance(leaf, str) else None
    return found[1] if found else None


def _spell(leaves: dict[str, Any], key: str) -> str:
    return repr(leaves[key]) if key in leaves else "not set"
