"""Draw pictures: a captioned PNG grid from prompts, by a pipeline folder, a hub name or a run's work dir."""

import argparse
from pathlib import Path
from typing import Any

from diffengine.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a pipeline folder, a hub name, or a run's work dir")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--seed", type=int, default=0, help="picture i draws from SEED + i (default 0)")
    parser.add_argument("--guidance", type=float, default=10.0, help="guidance scale (default 10)")
    parser.add_argument("--steps", type=int, default=12, help="drawing steps (default 12)")
    parser.add_argument("--resolution", type=int, help="side in pixels; default the model's own")
    parser.add_argument("-o", "--output", default="sample.png", help="the PNG to write (default sample.png)")


def run(options: argparse.Namespace) -> int:
    import torch

    from diffengine.grids import save_grid
    from diffengine.models.drawing import draw
    from diffengine.models.loading import quiet_libraries

    quiet_libraries()
    path = _checked(options)
    pipeline = _pipeline(options.source).to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for place, prompt in enumerate(options.prompts):
        picture = draw(
            pipeline, prompt, options.seed + place, options.resolution,
            guidance_scale=options.guidance, num_inference_steps=options.steps,
        )  # fmt: skip
        pictures.append((prompt, picture))
        print(f"drew {place + 1}/{len(options.prompts)}: {prompt}", flush=True)
    save_grid(pictures, path)
    print(f"wrote {path}")
    return 0


def _checked(options: argparse.Namespace) -> Path:
    """The file to write; what is asked for is looked at before a model is loaded."""
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


def _pipeline(source: str) -> Any:
    """The pipeline of a folder or hub name, or over the newest checkpoint of a work dir."""
    from diffusers import AmusedPipeline

    from diffengine import config
    from diffengine.engine import checkpoint
    from diffengine.export import model_of, trusted_config
    from diffengine.models.base import MaskedImageModel
    from diffengine.models.loading import load_component

    folder = Path(source)
    if not folder.is_dir() or (folder / "model_index.json").exists():
        return load_component(source, "", AmusedPipeline.from_pretrained)
    newest = checkpoint.newest(folder)
    if newest is None:
        raise UserError(
            f"'{folder}' is neither a pipeline folder (no model_index.json) nor a work dir (no checkpoint)"
        )
    state = checkpoint.read(newest)
    source = f"checkpoint '{newest}'"
    model = model_of(state, config.resolve(trusted_config(state, None, source)), source)
    if not isinstance(model, MaskedImageModel):
        raise UserError(f"{source} is of {type(model).__name__}, which draws nothing from text")
    return model.build_pipeline()
