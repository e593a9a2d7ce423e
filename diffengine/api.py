"""What the commands do, from Python: errors are raised as UserError, not printed."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffengine import config, distributed
from diffengine.datasets import (
    Findings,
    ImageDataset,
    ImageTextDataset,
    Shapes,
    Stream,
    UnreadableImage,
    as_list,
    center_crop,
    fixed_samples_of,
    hold_out,
    inspect,
    open_dataset,
    spread,
    square_transforms,
)
from diffengine.datasets.inspect import shapes_of
from diffengine.datasets.split import MOST
from diffengine.datasets.transforms import TokenRegion
from diffengine.engine import check as checks
from diffengine.engine import checkpoint as checkpoints
from diffengine.engine import run as runs
from diffengine.engine.build import Job, build_image_transforms, build_model, load_config, make_job, model_assets
from diffengine.engine.check import Report
from diffengine.engine.hooks import ValidationHook
from diffengine.engine.run import Run
from diffengine.engine.state import load_model
from diffengine.errors import UserError, require
from diffengine.evaluation import EvalData, Evaluation, LossData, Source
from diffengine.evaluation import evaluate as run_evaluation
from diffengine.evaluation.scores import CLIP, available
from diffengine.export import DTYPES, Exported, export
from diffengine.models.base import MaskedImageModel, TrainableModel
from diffengine.models.generation import GenerationOptions, ImageRequest, ImageSampler, Order
from diffengine.models.loading import quiet_libraries
from diffengine.models.pipelines import open_pipeline
from diffengine.registry import build, resolve

ROUND_TRIPS = 8
MOST_IMAGES = 1000  # of a caption


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


@dataclass(frozen=True)
class RoundTrip:
    """An image, and what the model's tokens keep of it.

    Attributes:
        name: of the image.
        psnr: peak signal-to-noise ratio between the two in dB.
    """

    name: str
    image: Image.Image
    again: Image.Image
    psnr: float


def inspect_data(source: str | Path, *, config: str | None = None, **settings: Any) -> Findings:
    """Look at images and captions before training, as `diffengine data` does.

    Args:
        source: anything that a config's `data` may be.
        config: how images are read and cropped, and how captions are counted; None: as `amused_512_own` reads them,
            and without a model.
        settings: the config's settings by name.

    Raises:
        UnusableData: captions or metadata are wrong. Images that cannot be read are in `unreadable`.
    """
    resolved = load_config(config or "amused_512_own", settings={**settings, "data": source})[1]
    loader = resolved["train_dataloader"]
    dataset = open_dataset(loader["dataset"])
    model = data_model(resolved, dataset) if config else None
    shapes, lengths = shapes_of(loader, model and model.size_multiple), model and model.caption_lengths
    return inspect(dataset, shapes, lengths, seconds=None, most=None)


def round_trips(model: TrainableModel, dataset: ImageDataset, shapes: Shapes | None) -> list[RoundTrip]:
    """Of eight images, spread over the data; none if the model has no tokens."""
    trips: list[RoundTrip] = []
    if not isinstance(model, MaskedImageModel) or shapes is None:
        return trips
    for index in spread(len(dataset), ROUND_TRIPS):
        with suppress(UnreadableImage):
            image = dataset[index]["image"]
            image = center_crop(image, shapes.of(image.size))
            (again,) = model.sampler().reconstruct([image])
            error = float(np.square(np.asarray(image, np.float64) - np.asarray(again, np.float64)).mean())
            trips.append(RoundTrip(dataset.name(index), image, again, 10 * math.log10(255**2 / max(error, 1e-9))))
    return trips


def data_model(resolved: Mapping[str, Any], dataset: ImageDataset) -> TrainableModel:
    """The model of a config, on the host, to look at its data with."""
    quiet_libraries()
    return build_model(resolved, model_assets(resolved, dataset), resolved["seed"]).eval()


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
    require(not isinstance(prompts, str), f"prompts got the text {prompts!r}; expected a list of texts")
    size = size or (resolution and (resolution, resolution)) or None
    for side in size or ():
        config.check_side("size", side)
    sampler = load_sampler(source, base, dtype)
    requests = [
        ImageRequest(prompt, seed + index, negative, image, mask, strength) for index, prompt in enumerate(prompts)
    ]
    options = GenerationOptions(guidance, steps, order=order)
    return list(sampler.generate(requests, options, size))


def evaluate(
    sources: Sequence[str | Path], *, data: str | Path | None = None, split: str | None = None,
    prompts: Sequence[str] | None = None, out: str | Path | None = None, base: str | None = None,
    guidance: Sequence[float | None] = (None,), steps: Sequence[int] = (12,), order: Sequence[Order] = ("confidence",),
    per_caption: int = 1, max_images: int = 1024, seed: int = 0, resolution: int | None = None, dtype: str = "auto",
    compile: bool = False, clip: str = CLIP,
) -> Evaluation:  # fmt: skip
    """Generate from captions with every source and setting, and measure what comes out.

    Args:
        sources: as of `sample`.
        data: a config, or images as a config's `data`; None: what the first source, a run, was trained on.
        split: instead of the split that the config trains on; captions that it trains and others get a row each.
        prompts: captions without images, in place of data.
        out: the folder to write to; None: `eval` in the run's work dir, or `eval/NAME`.
        guidance, steps, order: each combination is a setting. A guidance of None is what suits the model.
        per_caption: images per caption.
        max_images: at most so many captions, spread over the data.
        seed: image i uses `seed + i`.
        resolution: side in pixels; None: each model's own.
        clip: the CLIP model that scores: a hub name in the local cache, or a folder.

    Raises:
        UserError: a source or the data cannot be opened, or a setting that a model cannot generate with.
    """
    quiet_libraries()
    for name, given in (("sources", sources), ("prompts", ["a"] if prompts is None else prompts)):
        require(not isinstance(given, str) and len(given) > 0, f"{name} got {given!r}; expected a list of at least one")
    require(1 <= per_caption <= MOST_IMAGES, f"--n got {per_caption}; expected 1 to {MOST_IMAGES}")
    if resolution is not None:
        config.check_side("--resolution", resolution)
    settings = [GenerationOptions(scale, count, order=each) for scale, count, each in product(guidance, steps, order)]
    found = [_source(source, base, dtype, compile) for source in sources]
    if prompts is not None:
        require(data is None and split is None, "got prompts and data; leave one out")
        captions = EvalData(prompts)
    else:
        captions = eval_data(_config_of(sources[0]) if data is None else str(data), split, max_images)
    folder = Path(sources[0])
    folder = folder.parent if folder.suffix == ".pth" else folder
    default = folder / "eval" if (folder / "config.py").exists() else Path("eval") / folder.name
    scores, missing = available(clip, torch.device("cuda") if torch.cuda.is_available() else None)
    return run_evaluation(
        found, captions, settings, Path(out or default), per_caption=per_caption, seed=seed, side=resolution,
        scores=scores, notes=missing,
    )  # fmt: skip


def eval_data(data: str, split: str | None, max_images: int) -> EvalData:
    """Captions and images of a config's data set, or of images as a config's `data`."""
    trained: set[str] | None = None
    dataset: ImageDataset
    loss: LossData | None
    if data.endswith(".py") or data in config.shipped():
        resolved = load_config(data)[1]
        section, loss = resolved["train_dataloader"]["dataset"], _loss_data(resolved)
        if split is not None:
            trained = {text for texts in open_dataset(section).all_captions() for text in texts}
            section = {**section, "split": split}
        dataset = open_dataset(section)
    else:
        dataset = ImageTextDataset(data) if split is None else ImageTextDataset(data, split=split)
        loss = LossData(
            lambda side, _: (fixed_samples_of(dataset, square_transforms(side), 0, min(MOST, max_images)), [])
        )
    require(max_images >= 1, f"--max-images got {max_images}; expected at least 1")
    samples = [dataset[index] for index in spread(len(dataset), max_images)]
    captions = [as_list(sample["text"])[0] for sample in samples]
    groups: dict[str, list[int]] = {}
    if trained is not None:
        groups["trained"] = [index for index, caption in enumerate(captions) if caption in trained]
        groups["unseen"] = [index for index, caption in enumerate(captions) if caption not in trained]
    return EvalData(captions, [sample["image"] for sample in samples], groups, loss=loss)


def _loss_data(resolved: Mapping[str, Any]) -> LossData | None:
    """What a run of a config validates on; None if it does not."""
    sections = [section for section in resolved.get("default_hooks", {}).values() if section]
    hook = next((build(section) for section in sections if resolve(section["type"]) is ValidationHook), None)
    if hook is None or hook.every == 0:
        return None
    loader, seed = resolved["train_dataloader"], resolved["seed"]

    @cache  # all sources have the same samples
    def read(multiple: int) -> Any:
        dataset = open_dataset(loader["dataset"])
        shape = {name: loader[name] for name in ("aspect", "max_aspect") if name in loader}
        transforms = build_image_transforms(loader["image_transforms"], multiple, **shape)
        if loader.get("unmasked_weight") == 1:
            transforms.append(TokenRegion(None))
        split, variations = hold_out(dataset, hook.held_out_share), loader.get("image_variations")
        stream = Stream(dataset, transforms, [], seed=seed, image_variations=variations, split=split)
        return hook.samples(stream, loader["dataset"])

    return LossData(lambda _, multiple: read(multiple), seed)


def _source(source: str | Path, base: str | None, dtype: str, compile: bool) -> Source:
    """A source to evaluate; its fingerprint is made of the names, sizes and times of its files."""
    path, newest = Path(source), checkpoint_of(source)
    files = [newest] if newest else sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    known = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]

    def load() -> ImageSampler:
        sampler = load_sampler(source, base, dtype)
        if compile:
            sampler.compile()
        return sampler

    return Source(str(source), load, f"{path.absolute()} on {base} in {dtype}: {known}")


def _config_of(source: str | Path) -> str:
    """The config that a run's work dir keeps."""
    path = Path(source)
    file = (path.parent if path.suffix == ".pth" else path) / "config.py"
    require(file.exists(), f"'{source}' is no run, so its data is not known; name it with --data, or give --prompts")
    return str(file)


def checkpoint_of(source: str | Path) -> Path | None:
    """The checkpoint that a source names, or the newest one of its work dir; None for another source."""
    path = Path(source)
    return checkpoints.newest(path) if path.is_dir() else path if path.suffix == ".pth" else None


def load_sampler(source: str | Path, base: str | None = None, dtype: str = "auto") -> ImageSampler:
    """What generates images with a source, on the GPU if there is one; arguments as of `sample`."""
    quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bf16" if device == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    require(dtype in DTYPES, f"dtype got '{dtype}'; expected auto or one of {', '.join(DTYPES)}")
    newest = None if base else checkpoint_of(source)
    if newest is None:
        sampler = open_pipeline(str(source), base)
    else:  # newer than a pipeline that convert wrote into the same folder
        model = load_model(newest).eval()
        if not isinstance(model, MaskedImageModel):
            raise UserError(f"checkpoint '{newest}' is of {type(model).__name__}, which generates nothing from text")
        sampler = model.sampler()
    return sampler.to(device, DTYPES[dtype])
