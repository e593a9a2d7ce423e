"""Trained modules as diffusers folders, checked by loading them back."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffengine.errors import UserError
from diffengine.models.base import MaskedImageModel, TrainableModel


def export_components(model: TrainableModel, out: Path, keys: Sequence[str] | None = None) -> list[Path]:
    """Write `out/<key>/` for the model's exportable components, each as safetensors in diffusers' form.

    A component is written beside and renamed, so a folder of that name is whole at any time.

    Args:
        keys: which; None for all.

    Returns:
        The folders.

    Raises:
        UserError: a key the model does not train, or a tensor that does not load back bit for bit.
    """
    modules = model.exportable
    for key in keys or []:
        if key not in modules:
            raise UserError(f"--save-keys got '{key}'; this model trains {', '.join(modules)}")
    written = []
    for key in keys or modules:
        target = out / key
        beside = _fresh(out / f".{key}.part")
        modules[key].save_pretrained(beside, safe_serialization=True)
        _check(modules[key], beside)
        _replace(beside, target)
        written.append(target)
    return written


def export_pipeline(model: TrainableModel, out: Path) -> Path:
    """Write a whole folder that `AmusedPipeline.from_pretrained(out)` opens; its modules are loaded back and compared.

    Raises:
        UserError: the model has no pipeline, or a tensor does not load back bit for bit.
    """
    if not isinstance(model, MaskedImageModel):
        raise UserError(f"{type(model).__name__} has no pipeline; leave --pipeline out to export {', '.join(model.exportable)}")
    pipeline = model.build_pipeline()
    beside = _fresh(out.with_name(f".{out.name}.part"))
    pipeline.save_pretrained(beside, safe_serialization=True)
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            _check(module, beside / name)
    out.mkdir(parents=True, exist_ok=True)
    for part in sorted(beside.iterdir()):
        _replace(part, out / part.name)
    beside.rmdir()
    return out


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def _replace(beside: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    beside.replace(target)


def _check(module: nn.Module, folder: Path) -> None:
    """Load a folder as anyone would and compare every tensor with the live module's."""
    loaded = type(module).from_pretrained(folder, local_files_only=True)  # type: ignore[attr-defined]
    back = loaded.state_dict()
    live = module.state_dict()
    wrong = [name for name in live.keys() ^ back.keys()]
    wrong += [
        name for name in live.keys() & back.keys()
        if not torch.equal(live[name].cpu().float(), back[name].cpu().float())
    ]  # fmt: skip
    if wrong:
        raise UserError(f"'{folder}' does not load back what was written: {len(wrong)} tensors, first {min(wrong)}")


def model_of(state: Mapping[str, Any], resolved: Mapping[str, Any], source: str) -> TrainableModel:
    """The model of a checkpoint, with its weights, on the host.

    Args:
        state: what `checkpoint.read` gave.
        resolved: the resolved config to build it by.
        source: the checkpoint's path, for errors.
    """
    from diffengine.registry import build

    model: TrainableModel = build(resolved["model"], assets=state["assets"], seed=resolved["seed"])
    model.load_trained_state(state["model"], source)
    return model.eval()


def trusted_config(state: Mapping[str, Any], given: Mapping[str, Any] | None, source: str) -> dict[str, Any]:
    """The config that a checkpoint carries, where building its model runs no code but what is trusted.

    A checkpoint is data. A class that it names is used if it is diffengine's, diffusers', transformers' or peft's,
    or if the CONFIG that the user names uses it too.

    Raises:
        UserError: `given` is of another model, or the checkpoint names a class that is not trusted.
    """
    own = json.loads(state["config"])
    trusted = ("diffengine.models.", "diffusers.", "transformers.", "peft.")
    if given is not None and given["model"].get("type") != own["model"].get("type"):
        raise UserError(
            f"{source} is of another model: got {own['model'].get('type')}, the config has {given['model'].get('type')}; "
            f"use the config it was trained with ('{state['name']}')"
        )
    known = set(_types(given["model"])) if given else set()
    for name in _types(own["model"]):
        if not name.startswith(trusted) and name not in known:
            raise UserError(
                f"{source} names the class '{name}', which is not run on a checkpoint's word; give the CONFIG that uses it"
            )
    return own


def _types(part: Any) -> list[str]:
    if isinstance(part, Mapping):
        own = [str(part["type"])] if "type" in part else []
        return own + [name for value in part.values() for name in _types(value)]
    return [name for item in part for name in _types(item)] if isinstance(part, list) else []
