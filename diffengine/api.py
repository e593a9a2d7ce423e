"""What the commands do, from Python: errors are raised as UserError, not printed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
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
from diffengine.export import DTYPES, Exported, export
from diffengine.models.base import MaskedImageModel
from diffengine.models.generation import GenerationOptions, ImageRequest, ImageSampler, Order
from diffengine.models.loading import quiet_libraries
from diffengine.models.pipelines import open_pipeline


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
    resolution: int | None = None, size: tuple[int, int] | None = None, guidance: float | None = None, steps: int = 12,
    negative: str = "", image: Image.Image | None = None, mask: Image.Image | None = None,
    strength: float | None = None, order: Order = "confidence", dtype: str = "auto",
) -> list[Image.Image]:  # fmt: skip
    """Generate an image per prompt; image i uses `seed + i`.

    Args:
        source: a pipeline folder, a hub name, a run's work dir or checkpoint, or a folder that `convert` wrote.
        base: the pipeline to put what `convert` wrote on; an adapter names its own.
        resolution, size: side, or (width, height), in pixels; None: that of `image`, else the model's own.
        guidance: guidance scale; None: what suits the model.
        steps: forward passes of the transformer.
        negative: what guidance leads away from.
        image, mask, strength, order: see `ImageRequest` and `GenerationOptions`.
        dtype: "fp32", "fp16", "bf16", or "auto": bf16 on a GPU that has it, else fp32.

    Raises:
        UserError: the source cannot be opened, or a setting that the model cannot generate with.
    """
    sampler = load_sampler(source, base, dtype)
    requests = [
        ImageRequest(prompt, seed + index, negative, image, mask, strength) for index, prompt in enumerate(prompts)
    ]
    options = GenerationOptions(guidance, steps, order=order)
    return list(sampler.generate(requests, options, size or (resolution and (resolution, resolution)) or None))


def load_sampler(source: str | Path, base: str | None = None, dtype: str = "auto") -> ImageSampler:
    """What generates images with a source, on the GPU if there is one; arguments as of `sample`."""
    quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bf16" if device == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    require(dtype in DTYPES, f"dtype got '{dtype}'; expected auto or one of {', '.join(DTYPES)}")
    folder = Path(source)
    newest = checkpoints.newest(folder) if folder.is_dir() else folder if folder.suffix == ".pth" else None
    if newest is None or base:
        sampler = open_pipeline(str(source), base)
    else:  # newer than a pipeline that convert wrote into the same folder
        model = load_model(newest).eval()
        if not isinstance(model, MaskedImageModel):
            raise UserError(f"checkpoint '{newest}' is of {type(model).__name__}, which generates nothing from text")
        sampler = model.sampler()
    return sampler.to(device, DTYPES[dtype])
