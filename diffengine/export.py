"""Trained modules as diffusers folders, checked by loading them back."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diffengine import __version__, config
from diffengine.errors import UserError
from diffengine.models import adapters
from diffengine.models.base import MaskedImageModel, TrainableModel
from diffengine.models.loading import load_module
from diffengine.registry import resolve
from diffengine.signatures import kinds_in

MARK = "_diffengine_version"  # in a pipeline's index

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# The largest difference of outputs, over the largest output, from the live model's with its weights rounded
# as they are written. The same sums are the same bits; a merged adapter's are sums in another order.
LOADED, MERGED = 1e-5, 1e-3


@dataclass(frozen=True)
class Exported:
    """What was written, loaded back, and held against the live model on a fixed input.

    Attributes:
        folder: where it is.
        difference: the largest difference of an output from the live model's: what rounding costs.
        relative: the same, over the largest output.
        lines: Python that opens it.
    """

    folder: Path
    difference: float
    relative: float
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.folder}, loaded back: its outputs differ from the live model's by at most "
            f"{self.difference:.1e} ({self.relative:.1e} of the largest)"
        )


def export_components(
    model: TrainableModel,
    out: Path,
    keys: Sequence[str] | None = None,
    *,
    merge: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Exported]:
    """Write `out/<key>/` for the model's exportable components: safetensors in diffusers' form.

    A component with an adapter gives a folder of the adapter, which peft and (LoRA, LoKr) diffusers load.
    Each is written beside, checked, and then renamed, so what stands under its name is always whole.

    Args:
        keys: which; None for all.
        merge: write whole components, adapters added to their base.
        dtype: of what is written.

    Raises:
        UserError: a key the model does not train, nothing to merge, a folder that may not be replaced, a full
            disk, or a component that does not load back as it is.
    """
    modules = model.exportable
    for key in keys or []:
        if key not in modules:
            raise UserError(f"--save-keys got '{key}'; this model trains {', '.join(modules)}")
    if merge and not any(adapters.config_of(modules[key]) for key in keys or modules):
        raise UserError("--merge got a model without adapters; leave it out")
    targets = {key: out / key for key in keys or modules}
    check_targets(model, targets.values())
    exported = []
    with _writing(out):
        for key, target in targets.items():
            beside = _fresh(out / f".{key}.tmp")
            if adapters.config_of(modules[key]) is not None and not merge:
                difference = _write_adapter(model, key, beside, dtype)
            else:
                with _as_written(whole := _whole(model, key, out), dtype):
                    whole.save_pretrained(beside, safe_serialization=True)
                _opens_as_fp32(beside)
                difference = _check_whole(model, key, whole, beside, dtype)
            lines = _lines(model, key, target, merge)
            _readable(beside)
            _replace(beside, target)
            exported.append(Exported(target, *difference, lines))
    return exported


def export_pipeline(model: TrainableModel, out: Path, *, dtype: torch.dtype = torch.float32) -> Exported:
    """Write a whole folder that `AmusedPipeline.from_pretrained(out)` opens, checked by loading it back.

    Adapters are merged. `dtype` is that of what was trained; the rest is written as it was loaded.

    Raises:
        UserError: the model has no pipeline; a pipeline is there that we did not write; else as
            `export_components`.
    """
    if not isinstance(model, MaskedImageModel):
        trained = ", ".join(model.exportable)
        raise UserError(f"{type(model).__name__} has no pipeline; leave --pipeline out to export {trained}")
    pipeline = model.build_pipeline()
    check_targets(model, [out / name for name in pipeline.components])
    index = out / "model_index.json"
    if index.exists() and MARK not in index.read_text(encoding="utf-8", errors="replace"):
        raise UserError(
            f"'{out}' holds a pipeline that diffengine did not write, which would be lost; write to another "
            "folder, or delete it"
        )
    with _writing(out):
        whole = {key: _whole(model, key, out) for key in model.exportable}
        pipeline.register_modules(**whole)
        beside = _fresh(out / ".pipeline.tmp")
        with ExitStack() as written:
            for module in whole.values():
                written.enter_context(_as_written(module, dtype))
            pipeline.save_pretrained(beside, safe_serialization=True)
        for key in whole:
            _opens_as_fp32(beside / key)
        differences = [_check_whole(model, key, whole[key], beside / key, dtype) for key in whole]
        for name, component in pipeline.components.items():
            if name not in whole:
                _check(component, type(component).from_pretrained(beside / name, local_files_only=True), beside)
        _readable(beside)
        _mark(beside / index.name)
        for part in sorted(beside.iterdir()):
            _replace(part, out / part.name)
        beside.rmdir()
    return Exported(out, *max(differences), (f"{type(pipeline).__name__}.from_pretrained({str(out)!r})",))


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
        for part in out.glob(".*.tmp"):
            shutil.rmtree(part, ignore_errors=True)


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _replace(beside: Path, target: Path) -> None:
    """Two renames: what stood there is deleted only when the new one is in its place."""
    if not target.is_dir():
        beside.replace(target)
        return
    old = target.rename(_fresh(target.with_name(f".{target.name}.old.tmp")))
    try:
        beside.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _mark(index: Path) -> None:
    """Note in a pipeline's index that it is ours; diffusers passes over such a key."""
    settings = {**json.loads(index.read_text(encoding="utf-8")), MARK: __version__}
    index.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _opens_as_fp32(folder: Path) -> None:
    """Let transformers load fp32 unless it is asked for more, as diffusers does; a pipeline mixes none."""
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("dtype", "float32") != "float32":
        path.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def _readable(folder: Path) -> None:
    """Files as the umask says: safetensors writes for the owner alone."""
    (sample := folder / ".mode").touch()
    mode = sample.stat().st_mode
    sample.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _lines(model: TrainableModel, key: str, target: Path, merge: bool) -> tuple[str, ...]:
    """Python that opens an exported component."""
    module = model.exportable[key]
    kind, config = type(module).__name__, adapters.config_of(module)
    if config is None or merge:
        return (f"{kind}.from_pretrained({str(target.parent)!r}, subfolder={key!r})",)
    base = str(config.base_model_name_or_path)
    apart = Path(base).is_dir() and not (Path(base) / key).is_dir()
    load = f"{key} = {kind}.from_pretrained({base!r}{'' if apart else f', subfolder={key!r}'})"
    with_peft = f"{key} = peft.PeftModel.from_pretrained({key}, {str(target)!r})"
    if not adapters.loads_in_diffusers(module):
        return load, with_peft
    weights = adapters.DIFFUSERS_WEIGHTS
    return load, f"{key}.load_lora_adapter({str(target)!r}, weight_name={weights!r})  # or {with_peft}"


# --------------------------------------------------------------------------------------------- checking


def _whole(model: TrainableModel, key: str, out: Path) -> nn.Module:
    """A component as one plain module: the live one, or its adapter merged into a base loaded anew.

    Raises:
        UserError: the method cannot be merged, or the sum is not what the live one computes.
    """
    live = model.exportable[key]
    if adapters.config_of(live) is None:
        return live
    beside = _fresh(out / ".adapter.tmp")
    adapters.write(live, key, beside)
    merged = adapters.merge(model.base(key), beside)
    shutil.rmtree(beside)
    with _as_written(live):
        _hold(model.probe(key, live), model.probe(key, merged), MERGED, f"the merged {key}")
    return merged


def _write_adapter(model: TrainableModel, key: str, beside: Path, dtype: torch.dtype) -> tuple[float, float]:
    """Write an adapter and load it by each loader that takes it; its outputs' difference from the live ones.

    Raises:
        UserError: a loader gives another model.
    """
    live = model.exportable[key]
    with _as_written(live, dtype):
        adapters.write(live, key, beside)
    with _as_written(live, dtype, again=torch.float32):
        rounded = model.probe(key, live)
    base = model.base(key)
    loaded = adapters.load_with_peft(base, beside)
    outputs = model.probe(key, base)
    _hold(rounded, outputs, LOADED, f"'{beside}', loaded by peft,")
    if adapters.loads_in_diffusers(live):
        base = loaded.unload()
        adapters.load_with_diffusers(base, beside)
        _hold(rounded, model.probe(key, base), LOADED, f"'{beside}', loaded by diffusers,")
    return _from_live(model, key, outputs)


def _check_whole(
    model: TrainableModel, key: str, whole: nn.Module, folder: Path, dtype: torch.dtype
) -> tuple[float, float]:
    """Load a component as anyone would and hold it, bit for bit, against what was to be written.

    Returns:
        Its outputs' difference from the live ones.

    Raises:
        UserError: something does not come back.
    """
    back = load_module(str(folder), key, type(whole))
    with _as_written(whole, dtype, again=torch.float32):
        _check(whole, back, folder)
    return _from_live(model, key, model.probe(key, back))


def _from_live(model: TrainableModel, key: str, outputs: Tensor) -> tuple[float, float]:
    live = model.exportable[key]
    with _as_written(live):
        return _difference(model.probe(key, live), outputs)


def _difference(live: Tensor, other: Tensor) -> tuple[float, float]:
    """The largest difference, and the same over the largest of `live`. Of broken weights both may be NaN."""
    difference = float((live - other).abs().max())
    return difference, difference / max(float(live.abs().max()), 1e-12)


def _hold(live: Tensor, other: Tensor, tolerance: float, name: str) -> None:
    """
    Raises:
        UserError: outputs that differ by more than the tolerance, over the largest; NaN equals NaN.
    """
    difference, relative = _difference(live.nan_to_num(), other.nan_to_num())
    if not relative <= tolerance:
        raise UserError(
            f"{name} is not the model that was trained: its outputs differ by {difference:.1e}, "
            f"{relative:.1e} of the largest, where at most {tolerance:.0e} is rounding"
        )


@contextmanager
def _as_written(
    module: nn.Module, dtype: torch.dtype = torch.float32, again: torch.dtype | None = None
) -> Iterator[None]:
    """Inside, the module lies on the host and what is written of it is `dtype` (then `again`).

    After, its tensors are the same as before: on a GPU they never left it.
    """
    written = {id(tensor) for tensor in adapters.tensors_of(module) if tensor.is_floating_point()}
    kept = [(tensor, tensor.data) for tensor in [*module.parameters(), *module.buffers()]]
    try:
        for tensor, data in kept:
            host = data.cpu()
            tensor.data = host.to(dtype).to(again or dtype) if id(tensor) in written else host
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def _check(component: Any, back: Any, folder: Path) -> None:
    """Hold the tensors, tokens or settings that came back against the live component's.

    Raises:
        UserError: something does not come back bit for bit.
    """
    live, loaded = _parts(component), _parts(back)
    wrong = [name for name in live.keys() & loaded.keys() if not _equal(live[name], loaded[name])]
    wrong += live.keys() ^ loaded.keys()
    if wrong:
        raise UserError(f"'{folder}' does not load back what was written: {len(wrong)} parts, first {min(wrong)}")


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
    try:
        model = kind(**options, assets=state["assets"], seed=resolved["seed"])
    except UserError as error:
        folder = state.get("folder", str(Path.cwd()))
        if folder == str(Path.cwd()):
            raise
        raise UserError(
            f"{error}; {source} was trained in '{folder}', where relative paths in its config start: "
            "go there, and try again"
        ) from error
    model.load_trained_state(state["model"], source)
    return model.eval()


def trusted_config(state: Mapping[str, Any], given: Mapping[str, Any] | None, source: str) -> dict[str, Any]:
    """Resolve the config that a checkpoint carries, and judge it before any class that it names is imported.

    A checkpoint is data. A class that its resolved config names is used only if it is on a closed list, or if
    the CONFIG that the user names uses it too.

    Args:
        state: the checkpoint.
        given: the user's CONFIG with its references; None if the command got none.
        source: what errors call the checkpoint.

    Returns:
        The resolved config.

    Raises:
        UserError: `given` is of another model, or the checkpoint names a class that is not trusted.
    """
    own = config.resolve(json.loads(state["config"]))
    theirs = config.substitute(dict(given)) if given is not None else None
    types = [item["model"].get("type") for item in (own, theirs) if item is not None]
    if len(set(types)) > 1:
        raise UserError(
            f"{source} is of another model: got {types[0]}, the config has {types[1]}; use the config it was "
            f"trained with ('{state['name']}')"
        )
    trusted = {*trusted_classes(), *(kinds_in(theirs["model"]) if theirs else ())}
    for name in kinds_in(own["model"]):
        if name not in trusted:
            raise UserError(
                f"{source} names the class '{name}', which is not run on a checkpoint's word; give the "
                "CONFIG that uses it"
            )
    return own


def trusted_classes() -> set[str]:
    """The classes that a checkpoint may name: our models, what they are built from, and peft's configs."""
    import peft

    return {
        "diffengine.models.amused.AmusedModel",
        "diffengine.models.vq.VQTokenizerModel",
        "diffusers.UVit2DModel",
        "diffusers.VQModel",
        "transformers.CLIPTextConfig",
        *(f"peft.{name}" for name in peft.__all__ if name.endswith("Config")),
    }
