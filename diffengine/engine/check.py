"""The first steps of a run on a few of its images, in a scratch folder: what will the whole of it take?"""

import io
import os
import shutil
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffengine import distributed
from diffengine.cache import CachedDataset, TokenCache
from diffengine.cache.tables import CHUNK, Table
from diffengine.cache.token_cache import caption_table, distinct_captions, image_table
from diffengine.datasets import ImageDataset, Stream, UnreadableImage, WrappedDataset
from diffengine.engine import build
from diffengine.engine.build import Job
from diffengine.engine.class_images import check_can_generate
from diffengine.engine.clock import Clock
from diffengine.engine.hooks import CheckpointHook, EMAHook
from diffengine.engine.run import Run, build_run
from diffengine.errors import UserError
from diffengine.files import existing_parent
from diffengine.registry import build as build_object
from diffengine.registry import resolve

SUBSET_ROWS = 16  # variations of images that are encoded to see how long one takes
STEPS = 3  # several ranks try the first two before they take them


@dataclass
class Report:
    """What a run takes; of one process if nothing else is said. Seconds and bytes.

    Attributes:
        images: in the data set. missing: of them, still to be generated before training.
        clock: of the whole run. steps: what a part of a step takes, by name. first_step: all of the first.
        parameters: trained. images_at_once: per forward pass. halved: whether memory ran out with more.
        description: precision, devices, and whether blocks are compiled.
        memory: held, by purpose; on a GPU with "activations". peak: the most at a time. available: on the device.
        checkpoint: one. checkpoints: how many are on disk at once, at most.
        cache: "folder", "rows", "captions", "bytes", "exists", and "seconds" to build it; or why there is none.
        free: on the work dir's disk. cache_free: on the cache's; None if it is the same.
    """

    images: int
    missing: int
    clock: Clock
    seconds: dict[str, float]
    first_step: float
    parameters: int
    images_at_once: int
    halved: bool
    description: str
    memory: dict[str, int]
    peak: int
    available: int
    checkpoint: int
    checkpoints: int
    cache: dict[str, Any] | str
    free: int
    cache_free: int | None

    @property
    def step(self) -> float:
        """Seconds of one step."""
        return sum(self.seconds.values())

    @property
    def training(self) -> float:
        """Seconds of all steps, without previews, checkpoints and the building of a cache."""
        return self.first_step + (self.clock.max_iters - 1) * self.step


def check(job: Job) -> Report:
    """Take the first steps of a run and measure the last of them. Nothing is generated, and nothing stays.

    Raises:
        UserError: on every rank, if the run could not be trained.
    """
    data, lengths = job.resolved["train_dataloader"], job.resolved["train_cfg"]
    with distributed.all_ranks():
        dataset = build.build_dataset(job)
        missing = dataset.missing_images()
        clock = Clock(lengths.get("max_epochs"), lengths.get("max_iters"), len(dataset), data["batch_size"])
        transforms = [build_object(transform) for transform in data["image_transforms"]]
        variations, skip = data.get("image_variations"), data.get("skip_unreadable", False)
        seed = job.resolved["seed"]
        stream = Stream(dataset, transforms, [], seed=seed, image_variations=variations, skip_unreadable=skip)
        subset = _subset(stream, skip or bool(missing and missing.numbers))
    assets = build.learn_assets(job, dataset)
    with tempfile.TemporaryDirectory(prefix="diffengine-check-") as folder:
        dry_job = _dry_job(job, clock, stream, Path(distributed.on_rank_0(lambda: folder)))
        with redirect_stdout(io.StringIO()):
            run = build_run(dry_job, dataset=subset, assets=assets)
            if missing:
                check_can_generate(missing, run.trainable)
            first_step, seconds = _take_steps(run, data.get("num_workers", 0))
        cache = TokenCache(
            **job.resolved.get("token_cache", {}), stream=stream, encoder=run.trainable.encoder, data=data,
            work_dir=job.work_dir, precision=run.optim_wrapper.precision, autocast=run.optim_wrapper.autocast,
        )  # fmt: skip
        memory, peak, described = run.memory(), run.peak_memory(), _describe_cache(cache, run)
        with distributed.all_ranks():
            pass  # rank 0 deletes the folder when all have measured
    parent = existing_parent(job.work_dir)
    cache_parent = existing_parent(described["folder"]) if isinstance(described, dict) else parent
    hooks = [hook for hook in build.build_hooks(job) if isinstance(hook, CheckpointHook)]
    if torch.cuda.is_available():
        memory["activations"] = max(0, peak - sum(memory.values()))
    return Report(
        images=len(dataset),
        missing=len(missing.numbers) if missing else 0,
        clock=clock,
        seconds=seconds,
        first_step=first_step,
        parameters=run.trained_parameters,
        images_at_once=run.train_loop.micro.size,
        halved=run.train_loop.micro.found is not None,
        description=f"{run.optim_wrapper.precision}, {distributed.world_size()} x {job.device.type}, {run.compiled}",
        memory=memory,
        peak=peak,
        available=available_memory(),
        checkpoint=run.checkpoint_bytes(),
        checkpoints=max((hook.kept_at_once(clock) for hook in hooks), default=0),
        cache=described,
        free=shutil.disk_usage(parent).free,
        cache_free=shutil.disk_usage(cache_parent).free if parent.stat().st_dev != cache_parent.stat().st_dev else None,
    )


def available_memory() -> int:
    """Bytes of memory that the device has in all."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _subset(stream: Stream, skip: bool) -> ImageDataset:
    """A few images, spread over the data set; those that cannot be read are left out if `skip`."""
    dataset, size = stream.dataset, len(stream.dataset)
    if isinstance(dataset, CachedDataset):
        return dataset
    count = min(size, max(1, SUBSET_ROWS // (stream.variations or 1)))
    indices: list[int] = []
    for index in dict.fromkeys([*(number * size // count for number in range(count)), *range(size)]):
        try:
            dataset[index]
        except UserError:
            if not skip:
                raise
            continue
        indices.append(index)
        if len(indices) == count:
            return WrappedDataset(dataset, indices, stream.variations)
    raise UnreadableImage(f"fewer than {count} of the {size} images can be read")


def _dry_job(job: Job, clock: Clock, stream: Stream, scratch: Path) -> Job:
    """The job in a scratch folder, of its whole length, with no hook but one that keeps an average."""
    resolved, section = job.resolved, dict(job.resolved.get("token_cache", {}))
    cache, rows = scratch / "cache", len(stream.dataset) * (stream.variations or 1)
    if isinstance(stream.dataset, CachedDataset):
        if distributed.rank() == 0:
            cache.mkdir()
            for file in Path(section["path"]).expanduser().glob("[!.]*"):
                (cache / file.name).symlink_to(file.resolve())
    elif section.get("use", "auto") == "auto" and clock.max_iters * clock.batch_size <= rows:
        section["use"] = False  # as the whole run decides; the subset is smaller
    averages = [hook for hook in resolved.get("custom_hooks", []) if resolve(hook["type"]) is EMAHook]
    changes = {
        "train_cfg": {**resolved["train_cfg"], "max_iters": max(clock.max_iters, STEPS), "max_epochs": None},
        "train_dataloader": {**resolved["train_dataloader"], "num_workers": 0},
        "token_cache": {**section, "path": str(cache)},
        "default_hooks": {},
        "custom_hooks": averages,
        "vis_backends": [],
    }
    return replace(job, work_dir=scratch / "run", resolved={**resolved, **changes})


def _take_steps(run: Run, num_workers: int) -> tuple[float, dict[str, float]]:
    """(seconds of the first step, seconds of a later one by part)."""
    count = 2 if distributed.world_size() == 1 else STEPS
    steps = [step for step in (run.train(steps=1, synchronize=True) for _ in range(count)) if step]
    seconds = dict(steps[-1].seconds)
    del seconds["all"]
    if num_workers:  # they read while steps are taken
        seconds["data"] = max(0.0, seconds["data"] / num_workers - (sum(seconds.values()) - seconds["data"]))
    return steps[0].seconds["all"], seconds


def _describe_cache(cache: TokenCache, dry_run: Run) -> dict[str, Any] | str:
    """The cache that the whole run would have, by that of the dry run; or why it has none."""
    clock, built = dry_run.clock, dry_run.cache
    reason = cache.obstacle(clock.max_iters * clock.batch_size)
    if reason:
        return reason
    counts = {"images": len(cache.stream.dataset) * cache.variations, "captions": len(distinct_captions(cache.stream))}
    tables = {"images": image_table(built.folder), "captions": caption_table(built.folder)}
    folder, seconds = cache.folder, 0.0
    exists = distributed.on_rank_0(cache.exists)
    if exists:
        size = image_table(folder).nbytes + caption_table(folder).nbytes
    else:
        size = sum(_scaled(table, counts[what]) for what, table in tables.items())
        per_row = {what: built.seconds[what] / len(table) for what, table in tables.items()}
        seconds = sum(per_row[what] * count for what, count in counts.items()) / distributed.world_size()
    return {
        "folder": folder, "rows": counts["images"], "captions": counts["captions"], "bytes": size, "exists": exists,
        "seconds": seconds,
    }  # fmt: skip


def _scaled(table: Table, rows: int) -> int:
    """Bytes of a table of so many rows like these."""
    values = table.value_bytes
    return round(values / len(table) * rows) + (table.nbytes - values) * -(-rows // CHUNK)
