"""What the commands do, from Python: errors are raised as UserError, not printed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffengine import config, distributed
from diffengine.commands.cache import build_cache
from diffengine.commands.sample import load_pipeline
from diffengine.engine import check as checks
from diffengine.engine import run as runs
from diffengine.engine.build import Job, load_config, make_job
from diffengine.engine.check import Report
from diffengine.engine.run import Run
from diffengine.engine.state import load_model
from diffengine.errors import UserError
from diffengine.export import DTYPES, Exported, export_components, export_pipeline
from diffengine.models.generation import generate
from diffengine.models.loading import quiet_libraries

__all__ = ["UserError", "cache", "check", "convert", "sample", "train"]


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
    """Take a config's first steps and say what time, memory and disk all of it takes; arguments as of `train`."""
    return checks.check(_job(name, settings))


def cache(name: str, **settings: Any) -> None:
    """Encode a config's images and captions into its token cache; arguments as of `train`."""
    build_cache(_job(name, settings))


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    keys: Sequence[str] | None = None,
    pipeline: bool = False,
    merge: bool = False,
    dtype: str = "fp32",
    ema: bool = False,
    name: str | None = None,
) -> list[Exported]:
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
    """
    quiet_libraries()
    model = load_model(Path(checkpoint), None if name is None else config.read(name), ema)
    if pipeline:
        return [export_pipeline(model, Path(out), dtype=DTYPES[dtype])]
    return export_components(model, Path(out), keys, merge=merge, dtype=DTYPES[dtype])


def sample(
    source: str | Path, prompts: Sequence[str], *, base: str | None = None, seed: int = 0,
    resolution: int | None = None, guidance: float = 10.0, steps: int = 12,
) -> list[Image.Image]:  # fmt: skip
    """Generate an image per prompt.

    Args:
        source: a pipeline folder, a hub name, a run's work dir or checkpoint, or a folder that `convert` wrote.
        prompts: what to generate; image i uses `seed + i`.
        base: the pipeline to put what `convert` wrote on; an adapter names its own.
        resolution: side in pixels; None: the model's own.
        guidance: the guidance scale.
        steps: generation steps.
    """
    quiet_libraries()
    pipeline = load_pipeline(str(source), base)
    options = {"guidance_scale": guidance, "num_inference_steps": steps}
    return [generate(pipeline, prompt, seed + index, resolution, **options) for index, prompt in enumerate(prompts)]
