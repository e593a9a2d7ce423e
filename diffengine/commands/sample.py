"""Generate images: a captioned PNG grid from prompts."""

import argparse
from pathlib import Path

from diffengine.errors import UserError, require


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
    from diffengine.api import load_pipeline
    from diffengine.grids import save_grid
    from diffengine.models.generation import generate
    from diffengine.models.loading import quiet_libraries

    quiet_libraries()
    path = Path(options.output)
    is_png = path.suffix.lower() == ".png" and not path.is_dir()
    require(options.steps >= 1, f"--steps got {options.steps}; expected at least 1")
    require(0 <= options.seed < 2**63, f"--seed got {options.seed}; expected a whole number from 0")
    require(is_png, f"--output got '{path}'; expected a file name that ends in .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error}") from error
    pipeline = load_pipeline(options.source, options.base)
    settings = {"guidance_scale": options.guidance, "num_inference_steps": options.steps}
    images = []
    for index, prompt in enumerate(options.prompts):
        images.append((prompt, generate(pipeline, prompt, options.seed + index, options.resolution, **settings)))
        print(f"generated {index + 1}/{len(options.prompts)}: {prompt}", flush=True)
    save_grid(images, path)
    print(f"wrote {path}")
    return 0
