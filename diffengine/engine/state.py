"""What of a run is saved, and how it is put back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffengine.engine import checkpoint
from diffengine.errors import UserError

# A resumed run may change these freely; anything else would make it another run than the one that was
# stopped.
FREE = (
    "max_epochs", "max_iters", "micro_batch_size", "num_workers", "skip_unreadable", "tf32", "work_dir",
    "default_hooks", "custom_hooks", "vis_backends",
)  # fmt: skip


def collect(runner: Any) -> dict[str, Any]:
    """The checkpoint of this moment. Tensors are the live ones: write it before the next step."""
    state = {
        "format": checkpoint.FORMAT,
        "name": runner.name,
        "config": json.dumps(runner.settings, ensure_ascii=False),
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

    Raises:
        UserError: what differs, with both values.
    """
    before, now = _flat(json.loads(state["config"])), _flat(settings)
    missing = object()
    changed = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key, missing) != now.get(key, missing) and not _free(key, before, now)
    ]
    if changed:
        raise UserError(
            f"cannot resume '{path}' under another config: {'; '.join(changed[:5])}; repeat the flags it was "
            "started with, or start a run of its own with --work-dir"
        )


def _flat(config: Any, path: str = "") -> dict[str, Any]:
    if isinstance(config, dict):
        return {
            name: leaf
            for key, value in config.items()
            for name, leaf in _flat(value, f"{path}.{key}").items()
        }
    return {path[1:]: config}


def _free(key: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a key is free, or a setting that only free keys refer to."""
    parts = key.split(".")
    if parts[0] in FREE or parts[-1] in FREE:
        return True
    users = [name for leaves in (before, now) for name, leaf in leaves.items() if leaf == f"${{{key}}}"]
    return bool(users) and all(name.split(".")[0] in FREE or name.split(".")[-1] in FREE for name in users)
