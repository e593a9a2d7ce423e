"""From a resolved config to a run: every part built, in the order they need one another."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.visualization import BaseVisBackend
from torch.utils.data import DataLoader

from diffengine import distributed
from diffengine.cache import CachedDataset, TokenCache
from diffengine.cache.token_cache import PATHS, attach
from diffengine.datasets import (
    ImageDataset,
    MissingImages,
    PositionSampler,
    Stream,
    as_dataset,
    make_loader,
    survey,
    survey_captions,
)
from diffengine.engine import checkpoint
from diffengine.engine.compiling import compile_model
from diffengine.engine.loop import StepLoop
from diffengine.engine.optim import (
    DTYPES,
    StepOptimWrapper,
    build_optim_wrapper,
    build_param_scheduler,
    resolve_precision,
)
from diffengine.engine.runner import Runner
from diffengine.engine.state import check_fits, check_same_run, check_types, restore
from diffengine.engine.workdir import begin
from diffengine.errors import UserError
from diffengine.files import atomic_write, is_inside
from diffengine.models.base import MaskedImageModel, PreviewRequest, TrainableModel
from diffengine.registry import build, resolve

DEFAULT_BACKENDS = ({"type": "diffengine.engine.backends.TensorboardBackend"},)


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
        dataset: `dict(type=ImageTextDataset, ...)`, or any class with `__len__` and `__getitem__`.
        image_transforms: change the image.
        batch_size: samples per optimizer step, of all GPUs together: what is learnt from does not depend on
            how many there are.
        transforms: run after them.
        num_workers: processes per GPU that read and transform, one per core at most.
        image_variations: forms of crop and flip per image; None for a new one each time.
        skip_unreadable: replace and count images that cannot be read, rather than stop.
        model, seed, start_iter: given by the run.
    """
    draw = model.sample_draw
    stream = Stream(
        build(dataset),
        [build(transform) for transform in image_transforms],
        [build(transform) for transform in transforms or []] + ([draw] if draw else []),
        seed=seed,
        image_variations=image_variations,
        skip_unreadable=skip_unreadable,
    )
    sampler = PositionSampler(
        batch_size, rank=distributed.rank(), world_size=distributed.world_size(), start_step=start_iter
    )
    return make_loader(stream, sampler, num_workers, pin_memory=torch.cuda.is_available())


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


def build_dataset(resolved: Mapping[str, Any], cache: TokenCache) -> ImageDataset:
    """The data set; or, where its images are not here, what the cache at a named path holds of it."""
    options = resolved["train_dataloader"]["dataset"]
    try:
        return as_dataset(build(options))
    except UserError as error:
        places = [options[name] for name in PATHS if isinstance(options.get(name), str)]
        here = any(Path(place).expanduser().exists() for place in places)
        cached = None if here else cache.dataset()
        if cached is None:
            raise
        if distributed.rank() == 0:
            print(f"training from the cache '{cache.path}' alone, since {error}", flush=True)
        return cached


def learn_assets(resolved: Mapping[str, Any], dataset: Any) -> dict[str, str]:
    """What a model learns from the captions before it is built: on rank 0, then told to all."""
    kind = resolve(resolved["model"]["type"])
    options = {key: value for key, value in resolved["model"].items() if key != "type"}

    def captions() -> Iterator[str]:
        return chain.from_iterable(dataset.all_captions())

    return distributed.on_rank_0(lambda: kind.learn_assets(options, captions))


def check_apart(place: Path, dataset: Mapping[str, Any], what: str, option: str) -> None:
    """Refuse to write inside the data's folder: a resumed run would learn from its own previews."""
    for name in PATHS:
        folder = dataset.get(name)
        if isinstance(folder, str) and Path(folder).expanduser().is_dir() and is_inside(place, folder):
            raise UserError(
                f"{what} '{place}' lies inside the data '{folder}', and what is written there would become "
                f"images to learn; choose a {option} outside of it"
            )


def build_run(
    settings: dict[str, Any],
    resolved: Mapping[str, Any],
    name: str,
    work_dir: Path,
    device: torch.device,
    resume: Path | None = None,
) -> Runner:
    """A run that is ready to train. Nothing is written, and no old run deleted, before every part is built.

    Args:
        settings, resolved: of `config.load`.
        name: the config's name.
        work_dir: of `workdir.claim`; a run that is still in it is to be deleted.
        resume: the checkpoint to go on from.

    Raises:
        UserError: on every rank, if a part cannot be built on any.
    """
    data = resolved["train_dataloader"]["dataset"]
    distributed.on_rank_0(lambda: check_apart(work_dir, data, "work dir", "--work-dir"))
    with distributed.all_ranks():
        state = _state(resume, settings)
    start_iter = state["counters"]["iter"] if state else 0
    parts = prepare(resolved, work_dir, device, start_iter, state["assets"] if state else None)
    steps = parts.loop.max_iters - start_iter
    with distributed.all_ranks():
        how = compile_model(parts.loop.compile, parts.model, steps, device)
    if state and resume:
        with distributed.all_ranks():
            check_fits(state, parts.model, parts.optim, parts.schedule, parts.loop, resume)
    distributed.on_rank_0(lambda: begin(work_dir, settings, name, resume is None, parts.model.exportable))
    runner = Runner(parts.model, work_dir, parts.hooks, parts.backends, settings, name, resolved["seed"])
    runner.set_training(parts.loop, parts.optim, parts.schedule)
    announce(runner, resolved, device)
    runner.logger.info(f"blocks run {how}")
    if state and resume:
        restore(runner, state, resume)
        runner.logger.info(f"resumed {resume} at step {start_iter}")
    return runner


def prepare(
    resolved: Mapping[str, Any],
    work_dir: Path,
    device: torch.device,
    start_iter: int = 0,
    assets: Mapping[str, str] | None = None,
) -> "Parts":
    """Every part of a run, and its data complete: class images drawn, tokens cached.

    Args:
        start_iter: the step to go on from.
        assets: of the run that goes on; None to learn them.
    """
    parts = build_parts(resolved, work_dir, device, start_iter, assets)
    draw_missing(parts.loop.stream.dataset, parts.model, parts.optim)
    attach_cache(parts, resolved, work_dir, start_iter)
    return parts


def build_parts(
    resolved: Mapping[str, Any],
    work_dir: Path,
    device: torch.device,
    start_iter: int = 0,
    assets: Mapping[str, str] | None = None,
) -> "Parts":
    """Every part of a run; nothing is drawn, encoded or written. Arguments as of `prepare`."""
    cache = TokenCache(**resolved.get("token_cache", {}))
    if cache.path:
        check_apart(cache.path, resolved["train_dataloader"]["dataset"], "cache", "cache_path")
    with distributed.all_ranks():
        dataset = build_dataset(resolved, cache)
    known = learn_assets(resolved, dataset) if assets is None else assets
    with distributed.all_ranks():
        return _build_parts(resolved, cache, dataset, known, start_iter, device, work_dir)


def _state(resume: Path | None, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint to go on from, if there is one, held against the config."""
    if resume is None:
        return None
    state = checkpoint.read(resume)
    checkpoint.verify(resume)
    check_types(state, resume)
    check_same_run(state, settings, resume)
    return state


@dataclass
class Parts:
    """What a runner is made of."""

    model: TrainableModel
    loop: StepLoop
    optim: StepOptimWrapper
    schedule: torch.optim.lr_scheduler.LRScheduler
    hooks: list[Hook]
    backends: list[BaseVisBackend]
    cache: TokenCache  # not attached to the loop's stream yet


def _build_parts(
    resolved: Mapping[str, Any],
    cache: TokenCache,
    dataset: Any,
    assets: Mapping[str, str],
    start_iter: int,
    device: torch.device,
    work_dir: Path,
) -> Parts:
    seed = resolved["seed"]
    backends = [build({"save_dir": str(work_dir), **item}) for item in resolved.get("vis_backends", DEFAULT_BACKENDS)]
    hooks = build_hooks(resolved)
    model = build_model(resolved, assets, seed)
    precision, _ = resolve_precision(resolved["optim_wrapper"].get("precision", "auto"), device)
    if precision in DTYPES:
        model.hold_frozen(DTYPES[precision])
    model.to(device).train()
    data = {**resolved["train_dataloader"], "dataset": dataset}
    loop = StepLoop(build_dataloader(**data, model=model, seed=seed, start_iter=start_iter), **resolved["train_cfg"])
    optim = build_optim_wrapper(**resolved["optim_wrapper"], model=model)
    schedule = build_param_scheduler(
        **resolved.get("param_scheduler", {}), optimizer=optim.optimizer, num_iters=loop.max_iters
    )
    return Parts(model, loop, optim, schedule, hooks, backends, cache)


def attach_cache(parts: Parts, resolved: Mapping[str, Any], work_dir: Path, start_iter: int) -> None:
    """Encode once what need not be encoded at each step.

    A problem in the data or its shape shows here, before the run writes anything of its own.
    """
    loop = parts.loop
    if not isinstance(loop.stream.dataset, CachedDataset):
        with distributed.all_ranks():
            loop.stream[start_iter * loop.batch_size]
    positions = loop.max_iters * loop.batch_size
    data, optim = resolved["train_dataloader"], parts.optim
    encoder = parts.model.encoder
    attach(parts.cache, loop.stream, encoder, data, work_dir, positions, optim.precision, optim.autocast)


def draw_missing(dataset: Any, model: TrainableModel, optim: StepOptimWrapper) -> None:
    """Draw the images that a data set waits for, with the model as it is before training.

    Rank 0 draws. Each is written beside and renamed, so a run that is killed goes on with the next one.

    Raises:
        UserError: on every rank, if the model cannot draw them, they cannot be written, or those that are
            there were drawn otherwise.
    """
    missing = distributed.on_rank_0(lambda: _to_draw(dataset.missing_images(), model))
    if missing:
        for number in missing.numbers:  # so no rank waits for longer than one image takes
            distributed.on_rank_0(partial(_draw_one, missing, number, model, optim))


def _to_draw(missing: MissingImages | None, model: TrainableModel) -> MissingImages | None:
    """What is missing, if this model can draw it, and has drawn what a run has drawn before."""
    if missing is None:
        return None
    if not isinstance(model, MaskedImageModel) or model.assets:
        check_can_draw(missing, model)
        return None
    missing.claim(model.origin)
    if missing.numbers:
        print(f"{_lack(missing)}: drawing '{missing.prompt}' before training", flush=True)
    return missing


def check_can_draw(missing: MissingImages, model: TrainableModel) -> None:
    """Raises UserError where images are missing and this model draws none from text."""
    if missing.numbers and (not isinstance(model, MaskedImageModel) or model.assets):
        why = "is built from nothing" if model.assets else "draws nothing from text"
        raise UserError(
            f"{_lack(missing)}, and the model, which {why}, cannot draw them; add them, or start from a trained model"
        )


def _lack(missing: MissingImages) -> str:
    return f"'{missing.folder}' lacks {len(missing.numbers)} class images"


def _draw_one(missing: MissingImages, number: int, model: TrainableModel, optim: StepOptimWrapper) -> None:
    """Write `NNNNNN.png`, unless it has come by itself."""
    path = missing.folder / f"{number:06}.png"
    request = PreviewRequest([missing.prompt], seed=number, options=missing.options)
    with optim.autocast():
        (image,) = model.preview(request)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with atomic_write(path) as temporary:
                image.image.save(temporary, "PNG")
        done = missing.numbers.index(number) + 1
        if done % 10 == 0 or done == len(missing.numbers):
            print(f"drew {done}/{len(missing.numbers)} class images", flush=True)
    except OSError as error:
        raise UserError(f"cannot write class image '{path}': {error}") from error


def announce(runner: Runner, resolved: Mapping[str, Any], device: torch.device) -> None:
    """What will be trained: its sizes, and what of images and captions is cut off."""
    loop = runner.train_loop
    precision, why = resolve_precision(resolved["optim_wrapper"].get("precision", "auto"), device)
    trained = sum(parameter.numel() for parameter in runner.trainable.parameters() if parameter.requires_grad)
    runner.logger.info(
        f"{runner.name}: {loop.num_samples} images, {loop.max_iters} steps of {loop.batch_size}, "
        f"{trained:,} trained parameters, {precision} ({why}) on {distributed.world_size()} x {device.type}, "
        f"in {runner.work_dir}"
    )
    report_survey(runner, loop.stream)


def build_hooks(resolved: Mapping[str, Any]) -> list[Hook]:
    """Default hooks by name (None switches one off), then custom ones."""
    default = [hook for hook in resolved.get("default_hooks", {}).values() if hook is not None]
    return [build(hook) for hook in [*default, *resolved.get("custom_hooks", [])]]


def report_survey(runner: Runner, stream: Stream) -> None:
    """What the square crop costs, where the data can tell sizes without decoding; and captions cut."""
    if distributed.rank() != 0:
        return
    sizes: Sequence[int] = [transform.size for transform in stream.image_transforms if hasattr(transform, "size")]
    captions = chain.from_iterable(stream.dataset.all_captions())
    lines = [survey(stream.dataset, sizes[-1])] if sizes else []
    for line in [*lines, survey_captions(captions, runner.trainable.caption_lengths)]:
        if line:
            runner.logger.info(line)
