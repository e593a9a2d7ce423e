"""What the commands do, from Python: errors are raised as UserError, not printed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AmusedPipeline
from PIL import Image

from diffengine import config, distributed
from diffengine.engine import check as checks
from diffengine.engine import checkpoint as checkpoints
from diffengine.engine import run as runs
from diffengine.engine.build import Job, load_config, make_job
from diffengine.engine.check import Report
from diffengine.engine.run import Run
from diffengine.engine.state import load_model
from diffengine.errors import UserError, require
from diffengine.export import Exported, export
from diffengine.models.adapters import load_with_peft, read_folder
from diffengine.models.base import MaskedImageModel
from diffengine.models.generation import generate
from diffengine.models.loading import load_component, load_module, quiet_libraries
from diffengine.text import one_line


def _job(name: str, settings: Mapping[str, Any]) -> Job:
    quiet_libraries()
    return make_job(name, *load_config(name, settings=settings), device=distributed.start())


def train(name: str, *, resume: str | None = None, overwrite: bool = False, **settings: Any) -> Run:
    """Train a config in this process.

    Args:
        name: a shipped config's name, or a config file's path.
        resume: "newest" for the work dir's newest checkpoint, or a checkpoint's path.
        overwrite: delete the run that the work dir holds.
        settings: the config's settings by name: `data="photos", batch_size=4, work_dir="work_dirs/photos"`. A section
            (`model=dict(mask_schedule="linear")`) merges.

    Returns:
        The finished run: `metrics`, `checkpoints`, `work_dir`, and `pipeline()` to generate images with.

    Raises:
        UserError: a mistake in the config, the data or the folder.
        Interrupted: Ctrl-C or SIGTERM; the step was finished and saved.
    """
    return runs.train(_job(name, settings), resume, overwrite)


def check(name: str, **settings: Any) -> Report:
    """Take a config's first steps and report what time, memory and disk all of it takes; arguments as of `train`."""
    return checks.check(_job(name, settings))


def build_cache(name: str, **settings: Any) -> None:
    """Encode a config's images and captions into its token cache, unless it is up to date; arguments as of `train`."""
    runs.build_cache(_job(name, settings))


def convert(
    checkpoint: str | Path, out: str | Path, *, keys: Sequence[str] | None = None, pipeline: bool = False,
    merge: bool = False, dtype: str = "fp32", ema: bool = False, name: str | None = None,
) -> list[Exported]:  # fmt: skip
    """Write a checkpoint's trained components in diffusers' format.

    Args:
        checkpoint: a run's .pth file.
        out: the folder to write to.
        keys: components to write; None for all that was trained.
        pipeline: write a whole folder for `AmusedPipeline.from_pretrained`.
        merge: write whole components, adapters merged into their base.
        dtype: "fp32", "fp16" or "bf16".
        ema: write the averaged weights.
        name: the config that was trained, if it uses classes of your own.

    Raises:
        UserError: as of `load_model` and `export`.
    """
    quiet_libraries()
    model = load_model(Path(checkpoint), None if name is None else config.read(name), ema)
    return export(model, Path(out), keys, pipeline=pipeline, merge=merge, dtype=dtype)


def sample(
    source: str | Path, prompts: Sequence[str], *, base: str | None = None, seed: int = 0,
    resolution: int | None = None, guidance: float = 10.0, steps: int = 12,
) -> list[Image.Image]:  # fmt: skip
    """Generate an image per prompt; image i uses `seed + i`.

    Args:
        source: a pipeline folder, a hub name, a run's work dir or checkpoint, or a folder that `convert` wrote.
        base: the pipeline to put what `convert` wrote on; an adapter names its own.
        resolution: side in pixels; None: the model's own.
    """
    quiet_libraries()
    pipeline = load_pipeline(str(source), base)
    options = {"guidance_scale": guidance, "num_inference_steps": steps}
    return [generate(pipeline, prompt, seed + index, resolution, **options) for index, prompt in enumerate(prompts)]


def load_pipeline(source: str, base: str | None = None) -> Any:
    """An AmusedPipeline on the GPU, if there is one, without a progress bar; arguments as of `sample`."""
    pipeline = _load_pipeline(source, base).to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load_pipeline(source: str, base: str | None) -> Any:
    """The pipeline of a folder, hub name or checkpoint, or what convert wrote, put on its base."""
    folder = Path(source)
    newest = checkpoints.newest(folder) if folder.is_dir() else folder if folder.suffix == ".pth" else None
    if newest is not None and not base:  # newer than a pipeline that convert wrote into the same folder
        model = load_model(newest)
        if not isinstance(model, MaskedImageModel):
            raise UserError(f"checkpoint '{newest}' is of {type(model).__name__}, which generates nothing from text")
        return model.build_pipeline()
    if not folder.is_dir() or (folder / "model_index.json").exists():
        require(not base, f"--base got '{base}', but '{source}' is a whole pipeline; leave it out")
        return load_component(source, "", AmusedPipeline.from_pretrained)
    settings = [read_folder(item) for item in [folder, *sorted(folder.iterdir())]]
    base = base or next(filter(None, (item.get("base_model_name_or_path") for item in settings if item)), None)
    if base is None:
        known = "a pipeline folder (model_index.json), nor a work dir (checkpoints), nor an adapter that names its base"
        raise UserError(f"'{folder}' is neither {known}; for what convert wrote, name it with --base")
    return _put_on(load_component(base, "", AmusedPipeline.from_pretrained), folder)


def _put_on(pipeline: Any, folder: Path) -> Any:
    """The pipeline with the adapter, or the exported components, of a folder on it."""
    alone, found = _class_of(folder), False
    for name in ("transformer", "text_encoder", "vqvae"):
        module = getattr(pipeline, name)
        component = folder if alone == type(module).__name__ else folder / name
        if read_folder(component):
            try:
                load_with_peft(module, component)
            except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                raise UserError(f"adapter '{component}' does not fit {name} of the base: {one_line(error)}") from error
        elif (component / "config.json").is_file():
            pipeline.register_modules(**{name: load_module(str(component), name, type(module))})
        else:
            continue
        found = True
    require(found, f"'{folder}' holds no adapter or component that convert wrote")
    return pipeline


def _class_of(folder: Path) -> str | None:
    """The class of the component that a folder is, or is an adapter of; None for another folder."""
    adapter, path = read_folder(folder), folder / "config.json"
    if adapter is not None:
        return (adapter.get("auto_mapping") or {}).get("base_model_class")
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return settings.get("_class_name") or settings["architectures"][0]  # diffusers', transformers'
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        raise UserError(f"'{path}' holds no config of a component: {error!r}") from error
