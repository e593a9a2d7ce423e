"""Opening a pipeline that anyone has saved: a folder, a hub name, or what `convert` wrote on its base."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from diffengine.errors import UserError, require
from diffengine.files import read_json
from diffengine.models.adapters import put_on, read_folder
from diffengine.models.amused.components import CLASSES, Components
from diffengine.models.amused.sampler import AmusedSampler
from diffengine.models.generation import ImageSampler
from diffengine.models.loading import load_component, load_module

GUIDANCE = "_diffengine_guidance_scale"  # in the index of a pipeline that we wrote; diffusers ignores it
LARGEST_GUIDANCE = 10**6


def open_pipeline(source: str, base: str | None = None) -> ImageSampler:
    """The sampler of a pipeline folder or hub name, or of what `convert` wrote, put on a base; on the host, in fp32.

    Args:
        base: the pipeline to put what `convert` wrote on; an adapter names its own.

    Raises:
        UserError: a component is missing, broken, of another class, or does not fit the others.
    """
    folder = Path(source)
    if not folder.is_dir() or (folder / "model_index.json").exists():
        require(not base, f"--base got '{base}', but '{source}' is a whole pipeline; leave it out")
        return _open(source, None)
    settings = [read_folder(item) for item in [folder, *sorted(folder.iterdir())]]
    named = [item.get("base_model_name_or_path") for item in settings if item]
    base = base or next((name for name in named if isinstance(name, str) and name), None)
    if base is None:
        known = "a pipeline folder (model_index.json), nor a work dir (checkpoints), nor an adapter that names its base"
        raise UserError(f"'{folder}' is neither {known}; for what convert wrote, name it with --base")
    return _open(base, folder)


def _open(source: str, folder: Path | None) -> AmusedSampler:
    """The sampler of a whole pipeline, with the adapter or components of a folder on it."""
    index = load_component(source, "", _read_index)
    found = str(index.get("_class_name"))
    require(found.startswith("Amused"), f"'{source}' is a pipeline of {found}; expected an AmusedPipeline")
    components = Components(source, dict.fromkeys((*CLASSES, "tokenizer")), {}, seed=0)
    problems = components.problems()
    require(not problems, f"'{source}' holds components that do not fit: {'; '.join(problems)}")
    modules = {name: components.load(name).eval() for name in CLASSES}
    if folder is not None:
        _put_on(modules, folder)
    return AmusedSampler(**modules, tokenizer=components.tokenizer, scheduler=components.scheduler,
                         guidance_scale=index.get(GUIDANCE), graphs=True)  # fmt: skip


def _read_index(origin: str) -> dict[str, Any]:
    """The `model_index.json` of a folder or hub name; diffusers' own reader needs the pipeline's class."""
    path = Path(origin)
    file = path / "model_index.json" if path.is_dir() else Path(hf_hub_download(origin, "model_index.json"))
    index = read_json(file)
    scale = index.get(GUIDANCE, 1)
    fine = type(scale) in (int, float) and 0 <= scale <= LARGEST_GUIDANCE
    require(fine, f"'{file}' has a guidance scale of {scale!r}; expected a number from 0 to {LARGEST_GUIDANCE:,}")
    return index


def _put_on(modules: dict[str, Any], folder: Path) -> None:
    """Put the adapter, or the exported components, of a folder on a pipeline's modules, in place."""
    alone, found = _class_of(folder), False
    for name, module in modules.items():
        component = folder if alone == type(module).__name__ else folder / name
        if read_folder(component):
            put_on(module, component, name)
        elif (component / "config.json").is_file():
            modules[name] = load_module(str(component), name, type(module)).eval()
        else:
            continue
        found = True
    require(found, f"'{folder}' holds no adapter or component that convert wrote")


def _class_of(folder: Path) -> str | None:
    """The class of the component that a folder is, or is an adapter of; None for another folder."""
    adapter, path = read_folder(folder), folder / "config.json"
    if adapter is not None:
        mapping = adapter.get("auto_mapping")
        return str(mapping.get("base_model_class")) if isinstance(mapping, dict) else None
    if not path.is_file():
        return None
    settings = read_json(path)
    known = settings.get("_class_name") or settings.get("architectures")  # diffusers', transformers'
    return str(known[0] if isinstance(known, list) and known else known)
