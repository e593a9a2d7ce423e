"""Generate images: a captioned PNG grid from prompts.

With a pipeline folder, a hub name, a run's work dir or checkpoint, or what `convert` wrote on the base that it was
trained from.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from diffengine.errors import UserError
from diffengine.text import one_line


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", help="a pipeline folder, a hub name, a run's work dir or checkpoint, or a folder that convert wrote")
    add("prompts", nargs="+", metavar="PROMPT")
    add("--base", help="the pipeline to put what convert wrote on; an adapter names its own")
    add("--seed", type=int, default=0, help="image i uses SEED + i (default 0)")
    add("--guidance", type=float, default=10.0, help="guidance scale (default 10)")
    add("--steps", type=int, default=12, help="generation steps (default 12)")
    add("--resolution", type=int, help="side in pixels; default the model's own")
    add("-o", "--output", default="sample.png", help="the PNG to write (default sample.png)")


def run(options: argparse.Namespace) -> int:
    import torch

    from diffengine.grids import save_grid
    from diffengine.models.generation import generate
    from diffengine.models.loading import quiet_libraries

    quiet_libraries()
    path = _checked_output(options)
    pipeline = load_pipeline(options.source, options.base).to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for index, prompt in enumerate(options.prompts):
        image = generate(
            pipeline, prompt, options.seed + index, options.resolution,
            guidance_scale=options.guidance, num_inference_steps=options.steps,
        )  # fmt: skip
        images.append((prompt, image))
        print(f"generated {index + 1}/{len(options.prompts)}: {prompt}", flush=True)
    save_grid(images, path)
    print(f"wrote {path}")
    return 0


def _checked_output(options: argparse.Namespace) -> Path:
    """The file to write. Options are checked before a model is loaded."""
    if options.steps < 1:
        raise UserError(f"--steps got {options.steps}; expected at least 1")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed got {options.seed}; expected a whole number from 0")
    path = Path(options.output)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"--output got '{path}'; expected a file name that ends in .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error}") from error
    return path


def load_pipeline(source: str, base: str | None) -> Any:
    """The pipeline of a folder, hub name or checkpoint, or what convert wrote, put on its base."""
    from diffusers import AmusedPipeline

    from diffengine.engine import checkpoint
    from diffengine.engine.state import load_model
    from diffengine.models.adapters import read_folder
    from diffengine.models.base import MaskedImageModel
    from diffengine.models.loading import load_component

    folder = Path(source)
    newest = checkpoint.newest(folder) if folder.is_dir() else folder if folder.suffix == ".pth" else None
    if newest is not None and not base:  # newer than a pipeline that convert wrote into the same folder
        model = load_model(newest)
        if not isinstance(model, MaskedImageModel):
            raise UserError(f"checkpoint '{newest}' is of {type(model).__name__}, which generates nothing from text")
        return model.build_pipeline()
    if not folder.is_dir() or (folder / "model_index.json").exists():
        if base:
            raise UserError(f"--base got '{base}', but '{source}' is a whole pipeline; leave it out")
        return load_component(source, "", AmusedPipeline.from_pretrained)
    settings = [read_folder(item) for item in [folder, *sorted(folder.iterdir())]]
    bases = [item.get("base_model_name_or_path") for item in settings if item]
    base = base or next(filter(None, bases), None)
    if base is None:
        raise UserError(
            f"'{folder}' is neither a pipeline folder (no model_index.json) nor a work dir (no checkpoint), nor an "
            "adapter that names its base; for what convert wrote, name it with --base"
        )
    pipeline = load_component(base, "", AmusedPipeline.from_pretrained)
    _put_on(pipeline, folder)
    return pipeline


def _put_on(pipeline: Any, folder: Path) -> None:
    """Put an adapter, or the exported components in a folder, on a pipeline.

    Raises:
        UserError: nothing there fits.
    """
    from diffengine.models.adapters import load_with_peft, read_folder
    from diffengine.models.loading import load_module

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
    if not found:
        raise UserError(f"'{folder}' holds no adapter or component that convert wrote")


def _class_of(folder: Path) -> str | None:
    """The class of the component that a folder is, or is an adapter of; None for another folder."""
    from diffengine.models.adapters import read_folder

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
