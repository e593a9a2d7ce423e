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

from diffengine import distributed, registry
from diffengine.cache import CachedDataset, TokenCache
from diffengine.cache.tables import CHUNK
from diffengine.cache.token_cache import caption_table, distinct_captions, image_table
from diffengine.datasets import ImageDataset, Stream, UnreadableImage, WrappedDataset, hold_out
from diffengine.engine import build
from diffengine.engine.build import Job
from diffengine.engine.class_images import check_can_generate
from diffengine.engine.clock import Clock
from diffengine.engine.hooks import CheckpointHook, EMAHook
from diffengine.engine.run import Run, build_run
from diffengine.errors import UserError
from diffengine.files import existing_parent, expanded

SUBSET_ROWS = 16  # variations of images that are encoded to see how long one takes
STEPS = 3  # several ranks try the first two before they take them


@dataclass
class Report:
    """What a run takes; of one process unless noted. Seconds and bytes."""

    images: int  # in the data set
    missing: int  # of them, still to be generated before training
    clock: Clock  # of the whole run
    seconds: dict[str, float]  # of a later step, by phase
    first_step: float  # all of the first
    parameters: int  # trained
    images_at_once: int  # per forward pass
    halved: bool  # whether memory ran out with more
    description: str  # precision, devices, and whether blocks are compiled
    memory: dict[str, int]  # held, by purpose; on a GPU with "activations"
    peak: int  # the most at a time
    available: int  # on the device
    checkpoint: int  # one
    checkpoints: int  # how many are on disk at once, at most
    cache: dict[str, Any] | str  # "folder", "rows", "captions", "bytes", "exists", "seconds" to build it; or why none
    free: int  # on the work dir's disk
    cache_free: int | None  # on the cache's; None if it is the same

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
    data, lengths, seed = (job.resolved[name] for name in ("train_dataloader", "train_cfg", "seed"))
    with distributed.all_ranks():
        dataset = build.build_dataset(job)
        missing = dataset.missing_images()
        to_generate = sum(len(each.numbers) for each in missing)
        split = hold_out(dataset, build.held_out_share(build.build_hooks(job)) or 0.0)
        transforms = [registry.build(transform) for transform in data["image_transforms"]]
        variations, skip = data.get("image_variations"), data.get("skip_unreadable", False)
        options = {"seed": seed, "image_variations": variations, "skip_unreadable": skip, "split": split}
        stream = Stream(dataset, transforms, [], **options)
        clock = Clock(lengths.get("max_epochs"), lengths.get("max_iters"), len(stream), data["batch_size"])
        subset = _subset(stream, skip or to_generate > 0, one_shape=data.get("aspect") == "keep")
    assets = build.learn_assets(job, dataset)
    with tempfile.TemporaryDirectory(prefix="diffengine-check-") as folder:
        dry_job = _dry_job(job, clock, stream, Path(distributed.on_rank_0(lambda: folder)))
        with redirect_stdout(io.StringIO()):
            run = build_run(dry_job, dataset=subset, assets=assets)
            for each in missing:
                check_can_generate(each, run.trainable)
            seconds = _take_steps(run, data.get("num_workers", 0))
        made = run.train_loop.stream.image_transforms  # with aspect="keep" the model completes them
        stream = Stream(dataset, made, [], **options)
        report = _report(job, run, clock, stream, to_generate, seconds)
        with distributed.all_ranks():
            pass  # rank 0 deletes the folder when all have measured
    return report


def available_memory() -> int:
    """Bytes of memory that the device has in all."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _subset(stream: Stream, skip: bool, one_shape: bool) -> ImageDataset:
    """A few images, spread over the data set; those that cannot be read are left out if `skip`.

    With `one_shape` it is one image, several times, since most steps of the run are of one shape.
    """
    dataset, size = stream.dataset, len(stream.dataset)
    if isinstance(dataset, CachedDataset):
        return dataset
    count = min(size, max(1, SUBSET_ROWS // (stream.variations or 1)))
    indices: list[int] = []
    for index in dict.fromkeys([*(number * size // count for number in range(count)), *range(size)]):
        try:
            dataset[index]
            indices += [index] * (count if one_shape else 1)
        except UserError:
            if not skip:
                raise
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
            for file in expanded(section["path"]).glob("[!.]*"):
                (cache / file.name).symlink_to(file.resolve())
    elif section.get("use", "auto") == "auto" and clock.max_iters * clock.batch_size <= rows:
        section["use"] = False  # as the whole run decides; the subset is smaller
    averages = [hook for hook in resolved.get("custom_hooks", []) if registry.resolve(hook["type"]) is EMAHook]
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
    """(seconds of the first step, seconds of a later one by phase)."""
    count = 2 if distributed.world_size() == 1 else STEPS
    steps = [step for step in (run.train(steps=1, synchronize=True) for _ in range(count)) if step]
    seconds = {name: value for name, value in steps[-1].seconds.items() if name != "all"}
    if num_workers:  # they read while steps are taken
        seconds["data"] = max(0.0, seconds["data"] / num_workers - (sum(seconds.values()) - seconds["data"]))
    return steps[0].seconds["all"], seconds


def _report(job: Job, run: Run, clock: Clock, stream: Stream, missing: int, seconds: tuple[float, dict]) -> Report:
    """What the dry run, with its `seconds` as of `_take_steps`, and the disks show of the whole run."""
    memory, peak, micro = run.memory(), run.peak_memory(), run.train_loop.micro
    if torch.cuda.is_available():
        memory["activations"] = max(0, peak - sum(memory.values()))
    cache = _describe_cache(build.build_token_cache(job, stream, run.trainable, run.optim_wrapper), run)
    hooks = build.build_hooks(job)
    kept = [hook.kept_at_once(clock, build.validates(hooks)) for hook in hooks if isinstance(hook, CheckpointHook)]
    parent = existing_parent(job.work_dir)
    cache_parent = existing_parent(cache["folder"]) if isinstance(cache, dict) else parent
    one_disk = parent.stat().st_dev == cache_parent.stat().st_dev
    return Report(
        images=len(stream.dataset), missing=missing, clock=clock,
        seconds=seconds[1], first_step=seconds[0], parameters=run.trained_parameters,
        images_at_once=micro.size, halved=micro.found is not None,
        description=f"{run.optim_wrapper.precision}, {distributed.world_size()} x {job.device.type}, {run.compiled}",
        memory=memory, peak=peak, available=available_memory(),
        checkpoint=run.checkpoint_bytes(), checkpoints=max(kept, default=0), cache=cache,
        free=shutil.disk_usage(parent).free, cache_free=None if one_disk else shutil.disk_usage(cache_parent).free,
    )  # fmt: skip


def _describe_cache(cache: TokenCache, dry_run: Run) -> dict[str, Any] | str:
    """The cache that the whole run would have, by that of the dry run; or why it has none."""
    clock, built = dry_run.clock, dry_run.cache
    if reason := cache.why_unusable(clock.max_iters * clock.batch_size):
        return reason
    captions = distinct_captions(cache.stream.dataset, dry_run.train_loop.stream)
    counts = {"images": len(cache.stream.dataset) * cache.variations, "captions": len(captions)}
    folder, exists, seconds, size = cache.folder, distributed.on_rank_0(cache.exists), 0.0, 0
    for what, table_in in (("images", image_table), ("captions", caption_table)):
        if exists:
            size += table_in(folder).nbytes
            continue
        table, count = table_in(built.folder), counts[what]
        size += round(table.value_bytes / len(table) * count)
        size += (table.nbytes - table.value_bytes) * -(-count // CHUNK)  # what each chunk has besides values
        seconds += built.seconds[what] / len(table) * count / distributed.world_size()
    return {
        "folder": folder, "rows": counts["images"], "captions": counts["captions"], "bytes": size, "exists": exists,
        "seconds": seconds,
    }  # fmt: skip
