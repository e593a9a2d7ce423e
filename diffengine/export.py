"""Trained modules as diffusers folders: written, loaded back, compared."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diffengine import __version__
from diffengine.errors import UserError, require
from diffengine.files import delete, own, owned, real_path
from diffengine.models import adapters
from diffengine.models.base import MaskedImageModel, TrainableModel, describe
from diffengine.models.loading import load_module
from diffengine.models.pipelines import GUIDANCE

VERSION = "_diffengine_version"  # in the index of a pipeline; diffusers ignores it
TEMPORARY = ".export.tmp"  # a folder in the one that is written to
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# The largest accepted difference of outputs, over the largest, from the live model's with weights in the written dtype.
# A merged adapter adds in another order.
LOADED, MERGED = 1e-5, 1e-3
Difference = tuple[float, float]  # the largest of outputs, and the same over the largest output


@dataclass(frozen=True)
class Exported:
    """What was written, loaded back, and compared with the live model for a fixed input."""

    folder: Path
    difference: float  # the largest of an output from the live model's: the effect of rounding
    relative: float  # the same, over the largest output
    lines: tuple[str, ...]  # Python that opens the folder

    def __str__(self) -> str:
        apart = f"{self.difference:.1e} ({self.relative:.1e} of the largest)"
        return f"{self.folder}, loaded back: its outputs differ from the live model's by at most {apart}"


def export(
    model: TrainableModel, out: Path, keys: Sequence[str] | None = None, *,
    pipeline: bool = False, merge: bool = False, dtype: str = "fp32",
) -> list[Exported]:  # fmt: skip
    """Write trained components or, with `pipeline`, a whole pipeline folder; the rest as of `export_components`.

    Args:
        dtype: "fp32", "fp16" or "bf16".

    Raises:
        UserError: options that exclude each other; or as of `export_components` and `export_pipeline`.
    """
    require(dtype in DTYPES, f"dtype got '{dtype}'; expected one of {', '.join(DTYPES)}")
    require(not (pipeline and keys), "--pipeline writes every component; leave out --save-keys")
    require(not (pipeline and merge), "--pipeline merges adapters by itself; leave out --merge")
    if pipeline:
        return [export_pipeline(model, out, dtype=DTYPES[dtype])]
    return export_components(model, out, keys, merge=merge, dtype=DTYPES[dtype])


def export_components(
    model: TrainableModel, out: Path, keys: Sequence[str] | None = None, *,
    merge: bool = False, dtype: torch.dtype = torch.float32,
) -> list[Exported]:  # fmt: skip
    """Write `out/<key>/` for the model's exportable components: safetensors in diffusers' format.

    A component with an adapter becomes a folder of the adapter, which peft and (LoRA, LoKr) diffusers load. Each is
    checked in a temporary folder and then renamed, so what is under its name is always complete.

    Args:
        keys: which; None for all.
        merge: write whole components, adapters merged into their base.
        dtype: of what is written.

    Raises:
        UserError: the model does not train a key, or has nothing to merge; a folder must not be replaced, the disk is
            full, or a component does not load back equal.
    """
    modules = model.exportable
    for key in keys or []:
        require(key in modules, f"--save-keys got '{key}'; this model trains {', '.join(modules)}")
    targets = {key: out / key for key in keys or modules}
    adapted = [key for key in targets if adapters.config_of(modules[key]) is not None]
    require(bool(adapted) or not merge, "--merge got a model without adapters; leave it out")
    check_targets(model, targets.values())
    exported = []
    with _writing(out) as temporary:
        for key, target in targets.items():
            folder = temporary / key
            if key in adapted and not merge:
                difference = _write_adapter(model, key, folder, dtype)
            else:
                whole = _whole(model, key, temporary)
                with _as_written(whole, dtype=dtype):
                    whole.save_pretrained(folder, safe_serialization=True)
                _open_as_fp32(folder)
                difference = _check_whole(model, key, whole, folder, dtype)
            _publish(folder, target)
            exported.append(Exported(target, *difference, _opening_lines(model, key, target, merge)))
    return exported


def export_pipeline(model: TrainableModel, out: Path, *, dtype: torch.dtype = torch.float32) -> Exported:
    """Write a whole folder that `AmusedPipeline.from_pretrained(out)` opens, checked by loading it back.

    Adapters are merged. `dtype` is that of what was trained; the rest is written in its loaded one.

    Raises:
        UserError: the model has no pipeline; `out` holds one that we did not write; else as `export_components`.
    """
    if not isinstance(model, MaskedImageModel):
        trained = ", ".join(model.exportable)
        raise UserError(f"{type(model).__name__} has no pipeline; leave --pipeline out to export {trained}")
    components, index = model.pipeline_components, out / "model_index.json"
    check_targets(model, [*(out / name for name in components), index])
    with _writing(out) as temporary:
        folder = temporary / "pipeline"
        whole = {key: _whole(model, key, temporary) for key in model.exportable}
        with _as_written(*whole.values(), dtype=dtype):
            for name, component in {**components, **whole}.items():
                component.save_pretrained(folder / name)
        for key in whole:
            _open_as_fp32(folder / key)
        differences = [_check_whole(model, key, whole[key], folder / key, dtype) for key in whole]
        for name, component in components.items():
            if name not in whole:
                back = type(component).from_pretrained(folder / name, local_files_only=True)
                _check_equal(component, back, folder)
        settings = _pipeline_index(model, {**components, **whole})
        (folder / index.name).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for item in sorted(folder.iterdir()):
            _publish(item, out / item.name)
    return Exported(
        out, *max(differences), (f"{model.pipeline_class}.from_pretrained({str(out)!r})", *_unchecked(model))
    )


def _pipeline_index(model: MaskedImageModel, components: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of `model_index.json`, as diffusers writes it, and what `diffengine sample` reads of it."""
    classes = {
        name: [type(item).__module__.partition(".")[0], type(item).__name__] for name, item in components.items()
    }
    own = {VERSION: __version__, **({} if model.guidance_scale is None else {GUIDANCE: model.guidance_scale})}
    return {"_class_name": model.pipeline_class, "_diffusers_version": diffusers.__version__, **own, **classes}


def _unchecked(model: MaskedImageModel) -> list[str]:
    """A line if the pipeline's class cannot be asked whether it takes these components."""
    try:
        pipeline = model.build_pipeline()
    except UserError as error:
        return [f"# every component was loaded back, but not the pipeline: {error}"]
    require(
        set(pipeline.components) == set(model.pipeline_components), f"{model.pipeline_class} takes other components"
    )
    return []


def check_targets(model: TrainableModel, targets: Iterable[Path]) -> None:
    """Raise a UserError if something that we did not write would be lost, or a component was loaded from there."""
    sources = {real_path(folder): name for name, folder in model.sources.items()}
    for target in targets:
        if name := sources.get(real_path(target)):
            lost = f"is the {name} that this model was made from, and would be lost"
            raise UserError(f"'{target}' {lost}; write to another folder")
        _check_ours(target)


def _check_ours(path: Path) -> None:
    """Raise a UserError if there is something that we did not write."""
    if os.path.lexists(path) and path.name not in owned(path.parent) and not _is_empty(path):
        lost = f"'{path}' exists and was not written by diffengine"
        raise UserError(f"{lost}; move it away, or write to another folder")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not list(path.iterdir())


@contextmanager
def _writing(out: Path) -> Iterator[Path]:
    """Yield an empty temporary folder in `out`, deleted in the end; turn errors of the disk into the user's."""
    temporary = out / TEMPORARY
    try:
        _check_ours(temporary)
        out.mkdir(parents=True, exist_ok=True)
        own(out, owned(out) | {TEMPORARY})
        try:
            delete(temporary)  # of an export that was killed
            temporary.mkdir()
            yield temporary
        finally:
            delete(temporary)
            own(out, owned(out) - {TEMPORARY})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write to '{out}': {error}") from error


def _publish(item: Path, target: Path) -> None:
    """Rename a written folder or file to `target`; what it replaces is deleted only after that.

    Files get the permissions of the umask: safetensors writes for the owner alone.
    """
    sample = item.with_name(".mode")
    sample.touch()
    for file in [item, *item.rglob("*")]:
        if file.is_file():
            file.chmod(sample.stat().st_mode)
    sample.unlink()
    own(target.parent, owned(target.parent) | {target.name})
    old = item.with_name(f"{item.name}.old")
    if os.path.lexists(target):
        target.rename(old)
    try:
        item.rename(target)
    except OSError:
        if os.path.lexists(old):
            old.rename(target)
        raise
    delete(old)


def _open_as_fp32(folder: Path) -> None:
    """Let transformers load fp32 unless asked for another dtype, as diffusers does: a pipeline must not mix them."""
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("dtype", "float32") != "float32":
        path.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def _opening_lines(model: TrainableModel, key: str, target: Path, merge: bool) -> tuple[str, ...]:
    """Python that opens an exported component."""
    module = model.exportable[key]
    name, config = type(module).__name__, adapters.config_of(module)
    if config is None or merge:
        return (f"{name}.from_pretrained({str(target.parent)!r}, subfolder={key!r})",)
    base = str(config.base_model_name_or_path)
    alone = Path(base).is_dir() and not (Path(base) / key).is_dir()
    load = f"{key} = {name}.from_pretrained({base!r}{'' if alone else f', subfolder={key!r}'})"
    with_peft = f"{key} = peft.PeftModel.from_pretrained({key}, {str(target)!r})"
    if not adapters.loads_in_diffusers(module):
        return load, with_peft
    weights = adapters.DIFFUSERS_WEIGHTS
    return load, f"{key}.load_lora_adapter({str(target)!r}, weight_name={weights!r})  # or {with_peft}"


def _whole(model: TrainableModel, key: str, temporary: Path) -> nn.Module:
    """A component as one plain module: the live one, or its adapter merged into a base loaded again, and compared."""
    live = model.exportable[key]
    if adapters.config_of(live) is None:
        return live
    folder = temporary / f"{key}.adapter"
    adapters.write(live, folder)
    merged = adapters.merge(model.base(key), folder)
    with _as_written(live):
        _check_close(model.probe(key, live), model.probe(key, merged), MERGED, f"the merged {key}")
    return merged


def _write_adapter(model: TrainableModel, key: str, folder: Path, dtype: torch.dtype) -> Difference:
    """Write an adapter, check it with each of its loaders, and return its outputs' difference from the live ones."""
    live = model.exportable[key]
    with _as_written(live, dtype=dtype):
        adapters.write(live, folder)
    with _as_written(live, dtype=dtype, read_back=True):
        rounded = model.probe(key, live)
    base = model.base(key)
    loaded = adapters.load_with_peft(base, folder)
    outputs = model.probe(key, base)
    _check_close(rounded, outputs, LOADED, f"'{folder}', loaded by peft,")
    if adapters.loads_in_diffusers(live):
        base = loaded.unload()
        adapters.load_with_diffusers(base, folder)
        _check_close(rounded, model.probe(key, base), LOADED, f"'{folder}', loaded by diffusers,")
    with _as_written(live):
        return _difference(model.probe(key, live), outputs)


def _check_whole(model: TrainableModel, key: str, whole: nn.Module, folder: Path, dtype: torch.dtype) -> Difference:
    """Load a component, compare it bit for bit with `whole`, and return its outputs' difference from the live ones."""
    back = load_module(str(folder), key, type(whole))
    with _as_written(whole, dtype=dtype, read_back=True):
        _check_equal(whole, back, folder)
    live = model.exportable[key]
    with _as_written(live):
        return _difference(model.probe(key, live), model.probe(key, back))


def _difference(live: Tensor, other: Tensor) -> Difference:
    """The largest difference, and the same over the largest of `live`; NaN for broken weights."""
    difference = float((live - other).abs().max())
    return difference, difference / max(float(live.abs().max()), 1e-12)


def _check_close(live: Tensor, other: Tensor, tolerance: float, name: str) -> None:
    """Refuse outputs that differ by more than the tolerance, over the largest; NaN equals NaN."""
    difference, relative = _difference(live.nan_to_num(), other.nan_to_num())
    apart = f"{difference:.1e}, {relative:.1e} of the largest; at most {tolerance:.0e} is rounding"
    require(relative <= tolerance, f"{name} is not the model that was trained: its outputs differ by {apart}")


@contextmanager
def _as_written(*modules: nn.Module, dtype: torch.dtype = torch.float32, read_back: bool = False) -> Iterator[None]:
    """Inside, modules are on the host, and their written tensors have their values in `dtype`; `read_back`: as fp32.

    Then their tensors are the same as before: on a GPU they never left it.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for module in modules:
            whole = adapters.config_of(module) is None
            for tensor in [*module.parameters(), *module.buffers()]:
                kept.append((tensor, tensor.data))
                tensor.data = tensor.data.cpu()
                if tensor.is_floating_point() and (whole or tensor.requires_grad):
                    tensor.data = tensor.data.to(dtype).to(torch.float32 if read_back else dtype)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def _check_equal(component: Any, back: Any, folder: Path) -> None:
    """Compare the tensors, tokens or settings of a component with those that came back, bit for bit."""

    def content(item: Any) -> dict[str, Any]:
        if isinstance(item, nn.Module):
            return item.state_dict()
        if isinstance(item, PreTrainedTokenizerBase):
            return item.get_vocab()
        return {key: value for key, value in item.config.items() if not key.startswith("_")}

    def equal(live: Any, loaded: Any) -> bool:
        if not isinstance(live, Tensor):
            return live == loaded
        bits = [tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in (live, loaded)]
        return describe(live) == describe(loaded) and torch.equal(*bits)  # NaN too

    live, loaded = content(component), content(back)
    wrong = [name for name in live.keys() & loaded.keys() if not equal(live[name], loaded[name])]
    wrong += live.keys() ^ loaded.keys()
    first = f"{len(wrong)} entries differ, first {min(wrong, default='')}"
    require(not wrong, f"'{folder}' does not load back what was written: {first}")
