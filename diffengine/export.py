"""Trained modules as diffusers folders, checked by loading them back."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diffengine.errors import UserError
from diffengine.models.base import MaskedImageModel, TrainableModel
from diffengine.registry import resolve


def export_components(model: TrainableModel, out: Path, keys: Sequence[str] | None = None) -> list[Path]:
    """Write `out/<key>/` for the model's exportable components, each as safetensors in diffusers' form.

    A component is written beside, checked, and then renamed, so what stands under its name is always whole.

    Args:
        keys: which; None for all.

    Returns:
        The folders.

    Raises:
        UserError: a key the model does not train, a folder that may not be replaced, a full disk, or a tensor
            that does not load back bit for bit.
    """
    modules = model.exportable
    for key in keys or []:
        if key not in modules:
            raise UserError(f"--save-keys got '{key}'; this model trains {', '.join(modules)}")
    targets = {key: out / key for key in keys or modules}
    check_targets(model, targets.values())
    with _writing(out):
        for key, target in targets.items():
            beside = _fresh(out / f".{key}.part")
            modules[key].save_pretrained(beside, safe_serialization=True)
            _check(modules[key], beside)
            _replace(beside, target)
    return list(targets.values())


def export_pipeline(model: TrainableModel, out: Path) -> Path:
    """Write a whole folder that `AmusedPipeline.from_pretrained(out)` opens, checked by loading it back.

    Raises:
        UserError: the model has no pipeline; else as `export_components`.
    """
    if not isinstance(model, MaskedImageModel):
        trained = ", ".join(model.exportable)
        raise UserError(f"{type(model).__name__} has no pipeline; leave --pipeline out to export {trained}")
    pipeline = model.build_pipeline()
    check_targets(model, [out / name for name in pipeline.components])
    with _writing(out):
        beside = _fresh(out / ".pipeline.part")
        pipeline.save_pretrained(beside, safe_serialization=True)
        for name, component in pipeline.components.items():
            _check(component, beside / name)
        for part in sorted(beside.iterdir()):
            _replace(part, out / part.name)
        beside.rmdir()
    return out


def check_targets(model: TrainableModel, targets: Iterable[Path]) -> None:
    """Refuse folders that an export must not replace.

    Raises:
        UserError: a folder that a component was loaded from, or one that holds other things.
    """
    sources = {folder.resolve(): name for name, folder in model.sources.items()}
    for target in targets:
        if target.resolve() in sources:
            raise UserError(
                f"'{target}' is the {sources[target.resolve()]} that this model was made from, and would be "
                "lost; write to another folder"
            )
        ours = target.is_dir() and (list(target.glob("*config.json")) or not list(target.iterdir()))
        if target.exists() and not ours:
            raise UserError(f"'{target}' exists and holds no exported component; write to another folder")


# ---------------------------------------------------------------------------------------------- writing


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Errors of the disk, for the user; whatever is raised, nothing half-written stays."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write to '{out}': {error}") from error
    finally:
        for part in out.glob(".*.part"):
            shutil.rmtree(part, ignore_errors=True)


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _replace(beside: Path, target: Path) -> None:
    """Two renames: what stood there is deleted only when the new one is in its place."""
    if not target.is_dir():
        beside.replace(target)
        return
    old = target.rename(_fresh(target.with_name(f".{target.name}.old.part")))
    try:
        beside.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _check(component: Any, folder: Path) -> None:
    """Load a folder as anyone would; hold its tensors, tokens or settings against the live component's.

    Raises:
        UserError: something does not come back bit for bit.
    """
    live, back = _parts(component), _parts(type(component).from_pretrained(folder, local_files_only=True))
    wrong = [name for name in live.keys() & back.keys() if not _equal(live[name], back[name])]
    wrong += live.keys() ^ back.keys()
    if wrong:
        raise UserError(
            f"'{folder}' does not load back what was written: {len(wrong)} parts, first {min(wrong)}"
        )


def _parts(component: Any) -> dict[str, Any]:
    """What makes a component: its tensors, tokens or settings, by name."""
    if isinstance(component, nn.Module):
        return component.state_dict()
    if isinstance(component, PreTrainedTokenizerBase):
        return component.get_vocab()
    return {key: value for key, value in component.config.items() if not key.startswith("_")}


def _equal(live: Any, back: Any) -> bool:
    """Equality; of tensors bit for bit, NaN too."""
    if not isinstance(live, Tensor):
        return live == back
    bits = [tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in (live, back)]
    return live.dtype == back.dtype and live.shape == back.shape and torch.equal(*bits)


# ---------------------------------------------------------------------------------------------- reading


def model_of(state: Mapping[str, Any], resolved: Mapping[str, Any], source: str) -> TrainableModel:
    """The model of a checkpoint, with its weights, on the host.

    Args:
        state: what `checkpoint.read` gave.
        resolved: the resolved config to build it by.
        source: the checkpoint's path, for errors.

    Raises:
        UserError: the config names no model, a component is not there any more, or the weights do not fit.
    """
    options = {key: value for key, value in resolved["model"].items() if key != "type"}
    kind = resolve(resolved["model"]["type"])
    if not (isinstance(kind, type) and issubclass(kind, TrainableModel)):
        raise UserError(f"{source} names '{resolved['model']['type']}', which is no TrainableModel")
    model = kind(**options, assets=state["assets"], seed=resolved["seed"])
    model.load_trained_state(state["model"], source)
    return model.eval()


def trusted_config(state: Mapping[str, Any], given: Mapping[str, Any] | None, source: str) -> dict[str, Any]:
    """The config that a checkpoint carries, where building its model runs no code but what is trusted.

    A checkpoint is data. A class that it names is used if it is diffengine's, diffusers', transformers' or
    peft's, or if the CONFIG that the user names uses it too.

    Raises:
        UserError: `given` is of another model, or the checkpoint names a class that is not trusted.
    """
    own = json.loads(state["config"])
    trusted = ("diffengine.models.", "diffusers.", "transformers.", "peft.")
    kinds = [config["model"].get("type") for config in (own, given) if config is not None]
    if len(set(kinds)) > 1:
        raise UserError(
            f"{source} is of another model: got {kinds[0]}, the config has {kinds[1]}; use the config it was "
            f"trained with ('{state['name']}')"
        )
    known = set(_types(given["model"])) if given else set()
    for name in _types(own["model"]):
        if not name.startswith(trusted) and name not in known:
            raise UserError(
                f"{source} names the class '{name}', which is not run on a checkpoint's word; give the "
                "CONFIG that uses it"
            )
    return own


def _types(part: Any) -> list[str]:
    if isinstance(part, Mapping):
        own = [str(part["type"])] if "type" in part else []
        return own + [name for value in part.values() for name in _types(value)]
    return [name for item in part for name in _types(item)] if isinstance(part, list) else []
