"""From a config to the objects of a run: one function per section, and the job that carries them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from diffengine import config as configs
from diffengine import distributed
from diffengine.cache import TokenCache
from diffengine.cache.token_cache import cached_dataset
from diffengine.config import Plain
from diffengine.datasets import (
    Aspect,
    ByShape,
    ImageDataset,
    PositionSampler,
    Shapes,
    Split,
    Stream,
    VaryTags,
    make_loader,
    open_dataset,
    paths_of,
)
from diffengine.datasets.inspect import look_at_section
from diffengine.datasets.shapes import MAX_ASPECT
from diffengine.datasets.transforms import AnyTransform, TokenRegion, TokenWeights, Transform, effect_of
from diffengine.engine.loop import StepLoop
from diffengine.engine.mmengine_seam import REFUSED, AnyHook, BaseVisBackend
from diffengine.engine.optim import StepOptimWrapper, build_optim_wrapper, build_param_scheduler
from diffengine.errors import UserError, require
from diffengine.files import expanded, is_inside
from diffengine.models.base import MaskedImageModel, TrainableModel
from diffengine.registry import build, resolve
from diffengine.signatures import Between
from diffengine.text import shown, where

UNMASKED_WEIGHT = 0.1
DEFAULT_BACKENDS = ({"type": "diffengine.engine.backends.TensorboardBackend"},)
Training = tuple[TrainableModel, StepLoop, StepOptimWrapper, LRScheduler, TokenCache]  # what takes the steps of a run


@dataclass(frozen=True)
class Job:
    """A config to be run, in one process."""

    name: str  # the config's
    config: Plain  # as written, with references: what the run keeps
    resolved: Plain  # with every reference replaced
    work_dir: Path  # where a run of it goes
    device: torch.device  # this process's
    init_from: Path | None = None  # a checkpoint whose weights the run starts from
    looked: bool = False  # whether the data was looked at before
    dataset: ImageDataset | None = None  # the data that was looked at in this process


def load_config(name: str, options: Iterable[str] = (), settings: Mapping | None = None) -> tuple[Plain, Plain]:
    """Read and check a config: (as written, resolved). Arguments and errors as of `config.load`."""
    return configs.load(name, options, settings, BUILDERS)


def make_job(name: str, config: Plain, resolved: Plain, device: torch.device) -> Job:
    """A job of a loaded config; `name` is the config's name or path."""
    stem = Path(name).stem
    work_dir = expanded(resolved.get("work_dir") or f"work_dirs/{stem}")
    return Job(stem, config, resolved, work_dir, device)


def build_dataset(job: Job) -> ImageDataset:
    """Build the data set, and look at it; if its images are not on this machine, use the cache at `cache_path`."""
    options, section = job.resolved["train_dataloader"]["dataset"], job.resolved.get("token_cache", {})
    paths, dataset = [expanded(path) for path in paths_of(options)], None
    _check_outside(paths, job.work_dir, "work dir", "--work-dir")
    if section.get("path"):
        _check_outside(paths, Path(section["path"]), "cache", "cache_path")
    try:
        dataset = open_dataset(options) if job.dataset is None else job.dataset
        if not job.looked and distributed.rank() == 0:
            look_at_section(job.resolved["train_dataloader"], dataset)
        len(dataset)  # opens all sources
        return dataset
    except UserError as error:
        cached = None if any(path.exists() for path in paths) else cached_dataset(section, dataset)
        if cached is None:
            raise
        distributed.print_once(f"training from the cache '{section['path']}' alone, since {error}")
        return cached


def _check_outside(data: Sequence[Path], path: Path, what: str, option: str) -> None:
    """Refuse to write inside the data's folder: a resumed run would train on its own previews."""
    for folder in data:
        inside = folder.is_dir() and is_inside(path, folder)
        require(not inside, f"{what} '{path}' lies inside the data '{folder}'; choose a {option} outside of it")


def learn_assets(job: Job, dataset: ImageDataset) -> dict[str, str]:
    """What a model learns from the captions before it is built: on rank 0, then sent to all."""
    return distributed.on_rank_0(lambda: model_assets(job.resolved, dataset))


def model_assets(resolved: Mapping[str, Any], dataset: ImageDataset) -> dict[str, str]:
    """What the model of a config learns from the captions before it is built."""
    cls = resolve(resolved["model"]["type"])
    known = isinstance(cls, type) and issubclass(cls, TrainableModel)
    require(known, f"model got {shown(cls)}; expected a subclass of diffengine.models.base.TrainableModel")
    options = {key: value for key, value in resolved["model"].items() if key != "type"}
    return cls.learn_assets(options, lambda: chain.from_iterable(dataset.all_captions()))


def build_model(resolved: Mapping[str, Any], assets: Mapping[str, str], seed: int) -> TrainableModel:
    """The `model` section, on the host."""
    try:
        model = build(resolved["model"], assets=assets, seed=seed)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # of a library, by sizes or types
        raise UserError(f"the model cannot be built of the `model` section: {where(error)}") from error
    message = f"model got {type(model).__name__}; expected a subclass of diffengine.models.base.TrainableModel"
    require(isinstance(model, TrainableModel), message)
    choose_guidance(model, resolved)
    return model


def choose_guidance(model: TrainableModel, resolved: Mapping[str, Any]) -> None:
    """No guidance if all samples are trained with their caption: the model never learns to generate without one."""
    transforms = resolved.get("train_dataloader", {}).get("transforms") or []
    dropped = any(str(item["type"]).endswith("DropCaption") and item.get("p") != 0 for item in transforms)
    if isinstance(model, MaskedImageModel) and not dropped:
        model.guidance_scale = 1.0


def build_dataloader(
    dataset: Any,
    image_transforms: list,
    batch_size: Annotated[int, Between(1, 10**6)],
    transforms: list | None = None,
    num_workers: Annotated[int, Between(0, 1024)] = 0,
    image_variations: Annotated[int, Between(1, 10**6)] | None = None,
    skip_unreadable: bool = False,
    shuffle_tags: bool = False,
    drop_tags: float = 0.0,
    keep_tags: Annotated[int, Between(0, 10**6)] = 1,
    tag_separator: str = ",",
    caption_variations: Annotated[int, Between(1, 10**6)] | None = None,
    unmasked_weight: float = UNMASKED_WEIGHT,
    aspect: Aspect = "square",
    max_aspect: Annotated[float, Between(1, 64)] = MAX_ASPECT,
    *,
    model: TrainableModel,
    seed: int,
    start_iter: int,
    split: Split | None = None,
) -> DataLoader:
    """The `train_dataloader` section.

    Args:
        dataset: `dict(type=ImageTextDataset, ...)`: an ImageDataset, or any class with `__len__` and `__getitem__`. Its
            `path` may be a list, see `Sources`.
        image_transforms: change the image.
        batch_size: samples per optimizer step, of all GPUs together: what is learnt does not depend on how many.
        transforms: run after them.
        num_workers: processes per GPU that read and transform, at most one per core.
        image_variations: variations of crop and flip per image; None for a new one each time.
        skip_unreadable: replace and count images that cannot be read, instead of stopping.
        shuffle_tags, drop_tags, keep_tags, tag_separator: options of `VaryTags` for the captions that are trained.
        caption_variations: variations of a caption by the tags' order and drop; None for a new one each time.
        unmasked_weight: u, from 0 to 1, in data with masks: a token counts u + (1 - u) times its share of white, so one
            in the black counts u. 0: it is not learnt at all; 1: masks are ignored.
        aspect: "square" trains all images in the square that the image transforms make. "keep" trains each in the shape
            nearest to its own, of at most as many tokens, see `Shapes`.
        max_aspect: the largest ratio of the long to the short side with aspect="keep"; 1 is the square alone.
        model, seed, start_iter, split: given by the run; the last one says which images are trained.
    """
    changes = build_image_transforms(image_transforms, model.size_multiple, aspect, max_aspect)
    others = _build_transforms(transforms or [])
    vary_caption = _vary_tags(shuffle_tags, drop_tags, keep_tags, tag_separator, caption_variations)
    data = open_dataset(dataset)
    to_region, to_weights = _transforms_of_masks(data, model, unmasked_weight)
    sample_transform = model.sample_transform
    stream = Stream(
        data,
        [*changes, *to_region],
        [*others, *to_weights, *([sample_transform] if sample_transform else [])],
        seed=seed, image_variations=image_variations, skip_unreadable=skip_unreadable, split=split,
        vary_caption=vary_caption, caption_variations=caption_variations,
        batch_size=batch_size if aspect == "keep" else None,
    )  # fmt: skip
    rank, world_size = distributed.rank(), distributed.world_size()
    sampler = PositionSampler(batch_size, rank=rank, world_size=world_size, start_step=start_iter)
    return make_loader(stream, sampler, num_workers, pin_memory=torch.cuda.is_available())


def build_image_transforms(
    sections: Sequence, multiple: int, aspect: Aspect = "square", max_aspect: float = MAX_ASPECT
) -> list[AnyTransform]:
    """The `image_transforms` of a `train_dataloader` section; `multiple` is the model's `size_multiple`."""
    transforms = _build_transforms(sections)
    if aspect == "square":
        return transforms
    size = effect_of(transforms, None)[0] or (0, 1)
    expected = "expected a Resize and a Crop of one size among the image transforms"
    require(size[0] == size[1], f"aspect='keep' got image transforms that make no square; {expected}")
    return [ByShape(transforms, Shapes(size[0], multiple, max_aspect))]


def _build_transforms(sections: Sequence) -> list[AnyTransform]:
    transforms = [build(item) for item in sections]
    for transform in transforms:
        require(callable(transform), f"a transform got {shown(transform)}; expected what can be called")
    return transforms


def _vary_tags(shuffle: bool, drop: float, keep: int, separator: str, variations: int | None) -> VaryTags | None:
    """The transform of captions; None if they do not vary, and then no other option of it may be set."""
    if shuffle or drop:
        return VaryTags(shuffle, drop, keep, separator)
    got = {"keep_tags": (keep, 1), "tag_separator": (separator, ","), "caption_variations": (variations, None)}
    for name, (value, default) in got.items():
        message = f"{name} got {value!r}, but captions do not vary; set shuffle_tags or drop_tags, or unset {name}"
        require(value == default, message)
    return None


def _transforms_of_masks(
    dataset: ImageDataset, model: TrainableModel, unmasked_weight: float
) -> tuple[list[Transform], list[Transform]]:
    """For data with masks, the last of the image transforms, and a transform after them."""
    if not dataset.has_masks:
        message = f"unmasked_weight got {unmasked_weight}, but the data has no masks; add NAME.mask.png, or unset it"
        require(unmasked_weight in (UNMASKED_WEIGHT, 1), message)
        return [], []
    if unmasked_weight == 1:
        return [TokenRegion(None)], []
    message = "the data has masks, and this model learns whole images; set unmasked_weight=1 to ignore the masks"
    require(model.pixels_per_token is not None, message)
    weigh = TokenWeights(unmasked_weight)
    distributed.print_once(f"masks: the black counts {unmasked_weight:g}, and the white 1 (unmasked_weight)")
    return [TokenRegion(model.pixels_per_token)], [weigh]


def build_hooks(job: Job) -> list[AnyHook]:
    """Default hooks by name (None switches one off), then custom ones."""
    default = [hook for hook in job.resolved.get("default_hooks", {}).values() if hook is not None]
    sections = [*default, *job.resolved.get("custom_hooks", [])]
    for cls in [resolve(section["type"]) for section in sections]:
        advice = [REFUSED[refused] for refused in REFUSED if isinstance(cls, type) and issubclass(cls, refused)]
        require(not advice, f"custom_hooks got {cls.__name__}, which cannot work here; {''.join(advice)}")
    hooks = [build(section) for section in sections]
    for hook, section in zip(hooks, sections):
        expected = "expected a subclass of diffengine.engine.hooks.Hook"
        require(isinstance(hook, AnyHook), f"custom_hooks got {section['type']}; {expected}")
    return hooks


def held_out_share(hooks: Sequence[AnyHook]) -> float | None:
    """The share of the images that a hook wants to hold out; None if no hook asks."""
    return next((hook.held_out_share for hook in hooks if getattr(hook, "held_out_share", None) is not None), None)


def validates(hooks: Sequence[AnyHook]) -> bool:
    """Whether a hook evaluates images that are not trained."""
    return any(getattr(hook, "validates", False) for hook in hooks)


def build_backends(job: Job) -> list[BaseVisBackend]:
    """The `vis_backends` section."""
    section = job.resolved.get("vis_backends", DEFAULT_BACKENDS)
    found = [build({"save_dir": str(job.work_dir), **item}) for item in section]
    for backend in found:
        require(isinstance(backend, BaseVisBackend), f"vis_backends got {shown(backend)}; expected a BaseVisBackend")
    return found


def build_token_cache(job: Job, stream: Stream, model: TrainableModel, optim: StepOptimWrapper) -> TokenCache:
    """The `token_cache` section."""
    return TokenCache(
        **job.resolved.get("token_cache", {}), stream=stream, encoder=model.encoder,
        data=job.resolved["train_dataloader"], work_dir=job.work_dir, precision=lambda: optim.precision,
        autocast=optim.autocast,
    )  # fmt: skip


# The builder of each section without a `type`; the run passes its keyword-only parameters.
BUILDERS: dict[str, Callable] = {
    "train_dataloader": build_dataloader,
    "optim_wrapper": build_optim_wrapper,
    "param_scheduler": build_param_scheduler,
    "train_cfg": StepLoop,
    "token_cache": TokenCache,
}
