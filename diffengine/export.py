"""Trained modules as diffusers folders: written, loaded back, compared."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diffengine import __version__
from diffengine.errors import UserError
from diffengine.models import adapters
from diffengine.models.base import MaskedImageModel, TrainableModel
from diffengine.models.loading import load_module

MARK = "_diffengine_version"  # in the index of a pipeline that we wrote; diffusers ignores it

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# The largest difference of outputs, over the largest output, from the live model's with its weights rounded as they are
# written. Equal sums are equal bits; a merged adapter's are sums in another order.
LOADED, MERGED = 1e-5, 1e-3


@dataclass(frozen=True)
class Exported:
    """What was written, loaded back, and compared with the live model for a fixed input.

    Attributes:
        folder: where it is.
        difference: the largest difference of an output from the live model's: the effect of rounding.
        relative: the same, over the largest output.
        lines: Python that opens it.
    """

    folder: Path
    difference: float
    relative: float
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.folder}, loaded back: its outputs differ from the live model's by at most {self.difference:.1e} "
            f"({self.relative:.1e} of the largest)"
        )


def export_components(
    model: TrainableModel,
    out: Path,
    keys: Sequence[str] | None = None,
    *,
    merge: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Exported]:
    """Write `out/<key>/` for the model's exportable components: safetensors in diffusers' format.

    A component with an adapter becomes a folder of the adapter, which peft and (LoRA, LoKr) diffusers load. Each is
    written to a temporary folder, checked and then renamed, so what is under its name is always complete.

    Args:
        keys: which; None for all.
        merge: write whole components, adapters merged into their base.
        dtype: of what is written.

    Raises:
        UserError: a key that the model does not train, nothing to merge, a folder that must not be replaced, a full
            disk, or a component that does not load back equal.
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
            temporary = _fresh(out / f".{key}.tmp")
            if adapters.config_of(modules[key]) is not None and not merge:
                difference = _write_adapter(model, key, temporary, dtype)
            else:
                with _as_written(whole := _whole(model, key, out), dtype):
                    whole.save_pretrained(temporary, safe_serialization=True)
                _open_as_fp32(temporary)
                difference = _check_whole(model, key, whole, temporary, dtype)
            lines = _opening_lines(model, key, target, merge)
            _make_readable(temporary)
            _replace(temporary, target)
            exported.append(Exported(target, *difference, lines))
    return exported


def export_pipeline(model: TrainableModel, out: Path, *, dtype: torch.dtype = torch.float32) -> Exported:
    """Write a whole folder that `AmusedPipeline.from_pretrained(out)` opens, checked by loading it back.

    Adapters are merged. `dtype` is that of what was trained; the rest is written as it was loaded.

    Raises:
        UserError: the model has no pipeline; a pipeline exists there that we did not write; else as
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
            f"'{out}' holds a pipeline that diffengine did not write, which would be lost; write to another folder, or "
            "delete it"
        )
    with _writing(out):
        whole = {key: _whole(model, key, out) for key in model.exportable}
        pipeline.register_modules(**whole)
        temporary = _fresh(out / ".pipeline.tmp")
        with ExitStack() as written:
            for module in whole.values():
                written.enter_context(_as_written(module, dtype))
            pipeline.save_pretrained(temporary, safe_serialization=True)
        for key in whole:
            _open_as_fp32(temporary / key)
        differences = [_check_whole(model, key, whole[key], temporary / key, dtype) for key in whole]
        for name, component in pipeline.components.items():
            if name not in whole:
                back = type(component).from_pretrained(temporary / name, local_files_only=True)
                _check_equal(component, back, temporary)
        _make_readable(temporary)
        settings = {**json.loads((temporary / index.name).read_text(encoding="utf-8")), MARK: __version__}
        (temporary / index.name).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for item in sorted(temporary.iterdir()):
            _replace(item, out / item.name)
        temporary.rmdir()
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
                f"'{target}' is the {sources[target.resolve()]} that this model was made from, and would be lost; "
                "write to another folder"
            )
        ours = target.is_dir() and (list(target.glob("*config.json")) or not list(target.iterdir()))
        if target.exists() and not ours:
            raise UserError(f"'{target}' exists and holds no exported component; write to another folder")


# -------------------------------------------------------------------------------------------------------- writing


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turn errors of the disk into the user's; whatever is raised, no temporary folder stays."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write to '{out}': {error}") from error
    finally:
        for temporary in out.glob(".*.tmp"):
            shutil.rmtree(temporary, ignore_errors=True)


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _replace(temporary: Path, target: Path) -> None:
    """Two renames: the old folder is deleted only when the new one has its name."""
    if not target.is_dir():
        temporary.replace(target)
        return
    old = target.rename(_fresh(target.with_name(f".{target.name}.old.tmp")))
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _open_as_fp32(folder: Path) -> None:
    """Let transformers load fp32 unless asked for another dtype, as diffusers does: a pipeline must not mix them."""
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("dtype", "float32") != "float32":
        path.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def _make_readable(folder: Path) -> None:
    """Give files the permissions of the umask: safetensors writes for the owner alone."""
    (sample := folder / ".mode").touch()
    mode = sample.stat().st_mode
    sample.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


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


# ------------------------------------------------------------------------------------------------------- checking


def _whole(model: TrainableModel, key: str, out: Path) -> nn.Module:
    """A component as one plain module: the live one, or its adapter merged into a base loaded again.

    Raises:
        UserError: the method cannot be merged, or the sum does not compute what the live one does.
    """
    live = model.exportable[key]
    if adapters.config_of(live) is None:
        return live
    temporary = _fresh(out / ".adapter.tmp")
    adapters.write(live, key, temporary)
    merged = adapters.merge(model.base(key), temporary)
    shutil.rmtree(temporary)
    with _as_written(live):
        _check_close(model.probe(key, live), model.probe(key, merged), MERGED, f"the merged {key}")
    return merged


def _write_adapter(model: TrainableModel, key: str, folder: Path, dtype: torch.dtype) -> tuple[float, float]:
    """Write an adapter and load it with each loader that takes it; its outputs' difference from the live ones.

    Raises:
        UserError: a loader returns another model.
    """
    live = model.exportable[key]
    with _as_written(live, dtype):
        adapters.write(live, key, folder)
    with _as_written(live, dtype, again=torch.float32):
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


def _check_whole(
    model: TrainableModel, key: str, whole: nn.Module, folder: Path, dtype: torch.dtype
) -> tuple[float, float]:
    """Load a component as anyone would and compare it, bit for bit, with what was to be written.

    Returns:
        Its outputs' difference from the live ones.

    Raises:
        UserError: something is not equal.
    """
    back = load_module(str(folder), key, type(whole))
    with _as_written(whole, dtype, again=torch.float32):
        _check_equal(whole, back, folder)
    live = model.exportable[key]
    with _as_written(live):
        return _difference(model.probe(key, live), model.probe(key, back))


def _difference(live: Tensor, other: Tensor) -> tuple[float, float]:
    """The largest difference, and the same over the largest of `live`. For broken weights both may be NaN."""
    difference = float((live - other).abs().max())
    return difference, difference / max(float(live.abs().max()), 1e-12)


def _check_close(live: Tensor, other: Tensor, tolerance: float, name: str) -> None:
    """Refuse outputs that differ by more than the tolerance, over the largest; NaN equals NaN."""
    difference, relative = _difference(live.nan_to_num(), other.nan_to_num())
    if not relative <= tolerance:
        raise UserError(
            f"{name} is not the model that was trained: its outputs differ by {difference:.1e}, {relative:.1e} of the "
            f"largest, where at most {tolerance:.0e} is rounding"
        )


@contextmanager
def _as_written(
    module: nn.Module, dtype: torch.dtype = torch.float32, again: torch.dtype | None = None
) -> Iterator[None]:
    """Inside, the module is on the host and its written tensors are `dtype` (then `again`).

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
        return live.dtype == loaded.dtype and live.shape == loaded.shape and torch.equal(*bits)  # NaN too

    live, loaded = content(component), content(back)
    wrong = [name for name in live.keys() & loaded.keys() if not equal(live[name], loaded[name])]
    wrong += live.keys() ^ loaded.keys()
    if wrong:
        raise UserError(
            f"'{folder}' does not load back what was written: {len(wrong)} entries differ, first {min(wrong)}"
        )
