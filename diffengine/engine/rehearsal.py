"""The first steps of a run, at full shape, to see what the whole of it will take. Nothing of them stays."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from mmengine.hooks import Hook
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from diffengine import distributed
from diffengine.datasets import collate
from diffengine.engine.assemble import Parts, build_parts, check_apart
from diffengine.engine.compiling import compile_model
from diffengine.engine.hooks import CheckpointHook, EMAHook
from diffengine.engine.loop import TRIALS, Step
from diffengine.engine.measure import (
    Memory,
    checkpoint_bytes,
    kept_at_once,
    memory_of,
    peak_bytes,
    reset_peak,
    weights_of,
)
from diffengine.engine.runner import Runner
from diffengine.engine.standins import CacheFigures, stand_in_for_cache, stand_in_for_missing

READ = 16  # samples that are read to see how long one takes


@dataclass
class Seconds:
    """Where one step goes, in seconds. The parts follow one another.

    Attributes:
        data: the wait for a batch, as it settles: workers read while a step is taken.
        prepare: the model's `prepare`: images to tokens, where they come from no cache.
        passes: forward and backward.
        optimizer: the optimizer, with clipping and an average of the weights.
        first: the whole first step, which compiles and allocates.
    """

    data: float
    prepare: float
    passes: float
    optimizer: float
    first: float

    @property
    def step(self) -> float:
        return self.data + self.prepare + self.passes + self.optimizer


@dataclass
class Figures:
    """What a run takes; of one process where it says nothing else.

    Attributes:
        images: in the data set. awaited: of them, still to be drawn before training.
        steps, epochs, batch_size: of the whole run.
        at_once: images per forward. halved: whether memory had run out with more.
        parameters: trained ones.
        how: precision, and whether blocks are compiled, in words.
        seconds: of a step.
        memory: what is held. activations: bytes; on a GPU all that was allocated beside what is held, on a
            CPU what one micro-batch keeps for its backward pass. peak: the most at a time, previews apart.
            available: what the device has.
        checkpoint: bytes of one. checkpoints: on the disk at once, at the most.
        cache: or None, and no_cache says why.
        free: bytes on the disk of the work dir. free_for_cache: on that of the cache, None if it is the same.
    """

    images: int
    awaited: int
    steps: int
    epochs: float
    batch_size: int
    at_once: int
    halved: bool
    parameters: int
    how: str
    seconds: Seconds
    memory: Memory
    activations: int
    peak: int
    available: int
    checkpoint: int
    checkpoints: int
    cache: CacheFigures | None
    no_cache: str
    free: int
    free_for_cache: int | None

    @property
    def training(self) -> float:
        """Seconds of all steps; previews, checkpoints and the building of a cache apart."""
        return self.seconds.first + (self.steps - 1) * self.seconds.step


def rehearse(
    settings: dict[str, Any], resolved: Mapping[str, Any], name: str, work_dir: Path, device: torch.device
) -> Figures:
    """Take the first steps of a run through its own loop, and measure the last of them.

    Class images that are missing are not drawn, and a cache is not built: samples of a few images stand
    in for theirs. Arguments as of `assemble.build_run`; the work dir is only looked at.

    Raises:
        UserError: on every rank, where the run could not be trained.
    """
    dataset = resolved["train_dataloader"]["dataset"]
    distributed.on_rank_0(lambda: check_apart(work_dir, dataset, "work dir", "--work-dir"))
    with tempfile.TemporaryDirectory(prefix="diffengine-check-") as folder:
        scratch = Path(folder)
        parts = build_parts(resolved, scratch, device)
        with distributed.all_ranks():
            awaited = stand_in_for_missing(parts)
        cache, no_cache = stand_in_for_cache(parts, resolved, work_dir, scratch)
        steps, stream = parts.loop.max_iters, parts.loop.stream
        saving = [hook for hook in parts.hooks if isinstance(hook, CheckpointHook)]
        checkpoints = max((kept_at_once(hook.every, hook.keep, parts.loop) for hook in saving), default=0)
        with distributed.all_ranks():
            reading = _seconds_to_read(parts)
            how = compile_model(parts.loop.compile, parts.model, steps, device)
        watch, average = _take_steps(parts, settings, name, resolved["seed"], scratch)
    workers = parts.loop.dataloader.num_workers
    seconds = watch.seconds
    if workers:
        seconds.data = max(0.0, reading / workers - (seconds.step - seconds.data))
    memory = memory_of(parts.model, parts.optim.optimizer, average)
    on_gpu = device.type == "cuda"
    free, other = _free(work_dir, cache)
    return Figures(
        images=len(stream.dataset),
        awaited=awaited,
        steps=steps,
        epochs=steps * parts.loop.batch_size / len(stream.dataset),
        batch_size=parts.loop.batch_size,
        at_once=parts.loop.micro.size,
        halved=parts.loop.micro.found is not None,
        parameters=sum(item.numel() for item in parts.model.parameters() if item.requires_grad),
        how=f"{parts.optim.precision}, {distributed.world_size()} x {device.type}, {how}",
        seconds=seconds,
        memory=memory,
        activations=max(0, watch.peak - memory.total) if on_gpu else watch.saved.most,
        peak=watch.peak,
        available=_available(),
        checkpoint=checkpoint_bytes(parts.model, parts.optim.optimizer, average),
        checkpoints=checkpoints,
        cache=cache,
        no_cache=no_cache,
        free=free,
        free_for_cache=other,
    )


def _available() -> int:
    """Bytes of memory that the device has in all."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free(work_dir: Path, cache: CacheFigures | None) -> tuple[int, int | None]:
    """Bytes free for checkpoints; and for the cache, where that is another disk."""
    place = _nearest(work_dir)
    free, other = shutil.disk_usage(place).free, None
    if cache is not None:
        beside = _nearest(cache.folder)
        if beside.stat().st_dev != place.stat().st_dev:
            other = shutil.disk_usage(beside).free
    return free, other


def _nearest(path: Path) -> Path:
    """The folder that is there already, on the way to `path`."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


# --------------------------------------------------------------------------------------------------- steps


def _seconds_to_read(parts: Parts) -> float:
    """To read this process's share of a step, by one worker. A problem in the data shows here."""
    loop = parts.loop
    share = next(iter(loop.dataloader.batch_sampler))
    some = share[:READ]
    collate(loop.stream.__getitems__(some))  # what is opened once is open now
    began = time.perf_counter()
    collate(loop.stream.__getitems__(some))
    return (time.perf_counter() - began) * len(share) / len(some)


def _take_steps(
    parts: Parts, settings: dict[str, Any], name: str, seed: int, scratch: Path
) -> tuple["Watch", Mapping[str, Tensor]]:
    """Steps of a runner whose hooks draw, save and export nothing; and the average it kept, if it did."""
    averages = [hook for hook in parts.hooks if isinstance(hook, EMAHook)]
    loop = parts.loop
    loop.max_iters = 1 + (TRIALS if distributed.world_size() > 1 else 1)  # the last without a trial before it
    watch = Watch(parts)
    runner = Runner(parts.model, scratch, [*averages], [], settings, name, seed)
    runner.set_training(loop, parts.optim, parts.schedule)
    runner.register_hook(watch, priority="LOWEST")
    try:
        runner.train()
    finally:
        watch.close()
        for handler in list(runner.logger.handlers):
            handler.close()
            runner.logger.removeHandler(handler)
    return watch, averages[0].weights if averages else {}


@final
class Watch(Hook):
    """Where the last step goes. Each part is waited for, so they are slower than in training.

    Attributes:
        seconds: of the last step.
        saved: what it keeps for the backward pass; counted where no device counts what is allocated.
        peak: bytes, from before the first step on.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._device = parts.optim.device
        self._open = ExitStack()
        self._spent = {"prepare": 0.0, "optimizer": 0.0}
        self.saved = Saved(parts.model)
        self.peak = 0

    def before_train(self, runner: Any) -> None:
        reset_peak()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        loop = self._parts.loop
        if loop.done == loop.max_iters - 1:
            if self._device.type == "cpu":
                self._open.enter_context(self.saved.counting())
            self._around(self._parts.model, "prepare", "prepare", self.saved.start)
            self._around(self._parts.optim, "step", "optimizer")
        self._began = self._now()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Step | None = None
    ) -> None:
        assert outputs is not None
        seconds = self._now() - self._began
        loop = self._parts.loop
        if loop.done == 1:
            self._first = seconds + outputs.data_wait
        if loop.done == loop.max_iters:
            self.close()
            self.peak = peak_bytes()
            prepare, optimizer = self._spent["prepare"], self._spent["optimizer"]
            rest = seconds - prepare - optimizer
            self.seconds = Seconds(outputs.data_wait, prepare, rest, optimizer, self._first)

    def close(self) -> None:
        """Take off what was put around the parts."""
        self._open.close()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _around(self, owner: Any, method: str, part: str, before: Callable[[], None] = lambda: None) -> None:
        """Add up the seconds of a method of an object, until `close`."""
        inner = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            before()
            began = self._now()
            try:
                return inner(*arguments, **options)
            finally:
                self._spent[part] += self._now() - began

        setattr(owner, method, timed)
        self._open.callback(delattr, owner, method)


@final
class Saved:
    """Bytes that forward passes keep for their backward passes: distinct storages, weights apart.

    What a checkpointed block computes again in the backward pass is not among them.

    Attributes:
        most: of one micro-batch, from one `start` to the next.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in weights_of(model)}
        self._sizes: dict[int, int] = {}
        self.most = 0

    def start(self) -> None:
        """The next micro-batch begins."""
        self.most = max(self.most, sum(self._sizes.values()))
        self._sizes.clear()

    @contextmanager
    def counting(self) -> Iterator[None]:
        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._weights:
                self._sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # the tensor itself would keep itself alive

        with saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        self.start()
