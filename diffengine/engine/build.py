"""From a config to the objects of a run: one function per section, and the job that carries them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from diffengine import config as configs
from diffengine import distributed
from diffengine.cache import TokenCache
from diffengine.cache.token_cache import PATHS, cached_dataset
from diffengine.config import Plain
from diffengine.datasets import ImageDataset, PositionSampler, Stream, as_dataset, make_loader
from diffengine.engine.loop import StepLoop
from diffengine.engine.mmengine_seam import AnyHook, BaseVisBackend, check_hook
from diffengine.engine.optim import build_optim_wrapper, build_param_scheduler
from diffengine.errors import UserError
from diffengine.files import is_inside
from diffengine.models.base import TrainableModel
from diffengine.registry import build, resolve

DEFAULT_BACKENDS = ({"type": "diffengine.engine.backends.TensorboardBackend"},)


@dataclass(frozen=True)
class Job:
    """A config to be run, in one process.

    Attributes:
        name: the config's.
        config: as written, with references: what the run keeps.
        resolved: with every reference replaced.
        work_dir: where a run of it goes.
        device: this process's.
    """

    name: str
    config: Plain
    resolved: Plain
    work_dir: Path
    device: torch.device


def load_config(
    name: str, options: Iterable[str] = (), settings: Mapping[str, Any] | None = None
) -> tuple[Plain, Plain]:
    """Read and check a config: (as written, resolved). Arguments and errors as of `config.load`."""
    return configs.load(name, options, settings, BUILDERS)


def make_job(name: str, config: Plain, resolved: Plain, device: torch.device) -> Job:
    """A job of a loaded config.

    Args:
        name: the config's name or path.
    """
    stem = Path(name).stem
    work_dir = Path(resolved.get("work_dir") or f"work_dirs/{stem}").expanduser()
    return Job(stem, config, resolved, work_dir, device)


def build_dataset(job: Job) -> ImageDataset:
    """The data set; if its images are not on this machine, what the cache at a named path holds of it.

    Raises:
        UserError: neither exists; or the work dir or the cache lies inside the data.
    """
    options, section = job.resolved["train_dataloader"]["dataset"], job.resolved.get("token_cache", {})
    _check_outside(job.work_dir, options, "work dir", "--work-dir")
    if section.get("path"):
        _check_outside(Path(section["path"]), options, "cache", "cache_path")
    try:
        return as_dataset(build(options))
    except UserError as error:
        paths = [options[name] for name in PATHS if isinstance(options.get(name), str)]
        here = any(Path(path).expanduser().exists() for path in paths)
        cached = None if here else cached_dataset(section)
        if cached is None:
            raise
        distributed.print_once(f"training from the cache '{section['path']}' alone, since {error}")
        return cached


def _check_outside(path: Path, dataset: Mapping[str, Any], what: str, option: str) -> None:
    """Refuse to write inside the data's folder: a resumed run would train on its own previews."""
    for name in PATHS:
        folder = dataset.get(name)
        if isinstance(folder, str) and Path(folder).expanduser().is_dir() and is_inside(path, folder):
            raise UserError(
                f"{what} '{path}' lies inside the data '{folder}', and what is written there would become images to "
                f"train on; choose a {option} outside of it"
            )


def learn_assets(job: Job, dataset: ImageDataset) -> dict[str, str]:
    """What a model learns from the captions before it is built: on rank 0, then sent to all."""
    cls = resolve(job.resolved["model"]["type"])
    options = {key: value for key, value in job.resolved["model"].items() if key != "type"}

    def captions() -> Iterator[str]:
        return chain.from_iterable(dataset.all_captions())

    return distributed.on_rank_0(lambda: cls.learn_assets(options, captions))


def build_model(resolved: Mapping[str, Any], assets: Mapping[str, str], seed: int) -> TrainableModel:
    """The `model` section, on the host.

    Raises:
        UserError: it is no TrainableModel.
    """
    model = build(resolved["model"], assets=assets, seed=seed)
    if not isinstance(model, TrainableModel):
        raise UserError(
            f"model got {type(model).__name__}; expected a subclass of diffengine.models.base.TrainableModel"
        )
    return model


def build_dataloader(
    dataset: Any,
    image_transforms: list,
    batch_size: int,
    transforms: list | None = None,
    num_workers: int = 0,
    image_variations: int | None = None,
    skip_unreadable: bool = False,
    *,
    model: TrainableModel,
    seed: int,
    start_iter: int,
) -> DataLoader:
    """The `train_dataloader` section.

    Args:
        dataset: `dict(type=ImageTextDataset, ...)`: an ImageDataset, or any class with `__len__` and `__getitem__`.
        image_transforms: change the image.
        batch_size: samples per optimizer step, of all GPUs together: what is learnt does not depend on how many.
        transforms: run after them.
        num_workers: processes per GPU that read and transform, at most one per core.
        image_variations: variations of crop and flip per image; None for a new one each time.
        skip_unreadable: replace and count images that cannot be read, instead of stopping.
        model, seed, start_iter: given by the run.
    """
    sample_transform = model.sample_transform
    stream = Stream(
        build(dataset),
        [build(transform) for transform in image_transforms],
        [build(transform) for transform in transforms or []] + ([sample_transform] if sample_transform else []),
        seed=seed,
        image_variations=image_variations,
        skip_unreadable=skip_unreadable,
    )
    rank, world_size = distributed.rank(), distributed.world_size()
    sampler = PositionSampler(batch_size, rank=rank, world_size=world_size, start_step=start_iter)
    return make_loader(stream, sampler, num_workers, pin_memory=torch.cuda.is_available())


def build_hooks(job: Job) -> list[AnyHook]:
    """Default hooks by name (None switches one off), then custom ones.

    Raises:
        UserError: a hook of mmengine's that cannot work here.
    """
    default = [hook for hook in job.resolved.get("default_hooks", {}).values() if hook is not None]
    hooks = [build(hook) for hook in [*default, *job.resolved.get("custom_hooks", [])]]
    for hook in hooks:
        check_hook(hook)
    return hooks


def build_backends(job: Job) -> list[BaseVisBackend]:
    """The `vis_backends` section."""
    section = job.resolved.get("vis_backends", DEFAULT_BACKENDS)
    return [build({"save_dir": str(job.work_dir), **item}) for item in section]


# The sections that name no class: what builds each. Their parameters are the section's options; keyword-only
# parameters are given by the run.
BUILDERS: dict[str, Callable] = {
    "train_dataloader": build_dataloader,
    "optim_wrapper": build_optim_wrapper,
    "param_scheduler": build_param_scheduler,
    "train_cfg": StepLoop,
    "token_cache": TokenCache,
}
