"""From the stream to batches: how steps, ranks and workers slice it, and how samples are collated."""

import math
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import chain, count, pairwise
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any, final

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from diffengine import distributed
from diffengine.datasets.base import Sample
from diffengine.datasets.stream import Stream
from diffengine.errors import UserError, require
from diffengine.text import how_it_ended, one_line

Batch = dict[str, Any]
LARGEST = 1_000_000  # samples of a step

# Workers ignore these if the whole process group gets them: the main process finishes its step and saves; a worker that
# died would end the step in the middle.
LEFT_TO_MAIN = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


@final
@dataclass(eq=False)
class PositionSampler(Sampler[list[int]]):
    """For each step from `start_step` on, this rank's share of the step's positions, in order.

    Args:
        batch_size: of all ranks together, at least one sample for each.
        num_steps: the step to stop before, counted from 0 and not from start_step; None for no end.
    """

    batch_size: int
    _: KW_ONLY
    rank: int = 0
    world_size: int = 1
    start_step: int = 0
    num_steps: int | None = None

    def __post_init__(self) -> None:
        size, ranks = self.batch_size, self.world_size
        require(1 <= size <= LARGEST, f"batch_size got {size}; expected 1 to {LARGEST:,}")
        message = f"batch size {size} is split over {ranks} processes; expected at least one sample for each"
        require(size >= ranks, f"{message}; set it to {ranks} or more, or start fewer processes")
        assert 0 <= self.rank < ranks

    def __iter__(self) -> Iterator[list[int]]:
        first, end = (rank * self.batch_size // self.world_size for rank in (self.rank, self.rank + 1))
        for step in count(self.start_step) if self.num_steps is None else range(self.start_step, self.num_steps):
            start = step * self.batch_size
            yield list(range(start + first, start + end))

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("a PositionSampler without num_steps has no end, so no length")
        return max(0, self.num_steps - self.start_step)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack tensors; everything else becomes a list that stays on the host: texts, ints, ragged numpy arrays.

    So do tensors of different shapes, which `micro_batches` stacks.

    `num_targets`, the tokens of each sample that the loss counts, is 1 each unless a transform set it. `weight`, by
    which each of them counts in the loss, is present if any sample has one; the others' is 1.

    Raises:
        UserError: a weight is not a finite number above 0.
    """
    batch: Batch = {"num_targets": [1] * len(samples)}
    if any("weight" in sample for sample in samples):
        samples = [{**sample, "weight": float(sample.get("weight", 1.0))} for sample in samples]
    for key, value in samples[0].items():
        values = [sample[key] for sample in samples]
        alike = isinstance(value, torch.Tensor) and len({tensor.shape for tensor in values}) == 1
        batch[key] = torch.stack(values) if alike else values
    for weight in batch.get("weight", []):  # so no step has a total weight of 0
        require(0 < weight < math.inf, f"a sample got weight {weight}; expected a finite number above 0")
    return batch


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """A collated batch in `count` micro-batches of nearly equal size, whose tensors are views of it.

    If its samples have several shapes there are more: each is of one shape, and none is larger.
    """
    rows = len(batch["num_targets"])
    if not any(_is_ragged(value) for value in batch.values()):
        return [batch] if count == 1 else [_rows(batch, slice(*cut)) for cut in _cuts(rows, count)]
    found = []
    for group in same_shape([_shapes(batch, row) for row in range(rows)]):
        pieces = math.ceil(len(group) * count / rows)
        found += [_rows(batch, group[start:end]) for start, end in _cuts(len(group), pieces)]
    return found


def same_shape(shapes: Sequence[Any]) -> list[list[int]]:
    """The indices of equal shapes, in the order of their first appearance."""
    groups: dict[Any, list[int]] = {}
    for index, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(index)
    return list(groups.values())


def _is_ragged(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], torch.Tensor)


def _shapes(batch: Batch, row: int) -> tuple[torch.Size, ...]:
    return tuple(value[row].shape for value in batch.values() if _is_ragged(value))


def _cuts(rows: int, count: int) -> Iterator[tuple[int, int]]:
    return pairwise(rows * index // count for index in range(count + 1))


def _rows(batch: Batch, rows: slice | list[int]) -> Batch:
    """Some rows of a batch; tensors of one shape are stacked."""
    if isinstance(rows, slice):
        return {key: value[rows] for key, value in batch.items()}
    chosen = {key: value[rows] if isinstance(value, torch.Tensor) else [value[row] for row in rows]
              for key, value in batch.items()}  # fmt: skip
    return {key: torch.stack(value) if _is_ragged(value) else value for key, value in chosen.items()}


@final
@dataclass(eq=False)
class StreamReader(Dataset):
    """Reads lists of positions or rows. A UserError is returned as a value: torch would add a traceback to its text."""

    stream: Stream
    read: Callable[[Stream, Sequence[int]], Any]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        try:
            batch = self.read(self.stream, indices)
            if get_worker_info() is not None:
                _share(batch)
            return batch
        except UserError as error:
            return error


def _share(batch: Any) -> None:
    """Put a worker's tensors into shared memory; if torch does it later, in a thread, an error there hangs the run."""
    for sample in [batch] if isinstance(batch, dict) else batch:
        for value in chain.from_iterable(value if _is_ragged(value) else [value] for value in (sample or {}).values()):
            try:
                if isinstance(value, torch.Tensor):
                    value.share_memory_()
            except RuntimeError as error:
                if file := re.search(r"</(torch_\w+)>", str(error)):  # torch leaves it
                    Path("/dev/shm", file[1]).unlink(missing_ok=True)
                advice = "give /dev/shm more (docker run --shm-size=8g), or load with --cfg-options num_workers=0"
                raise UserError(f"a worker got no shared memory for a batch: {one_line(error)}; {advice}") from error


def make_loader(stream: Stream, sampler: PositionSampler, num_workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """A loader of collated batches, to be read by `batches_of`: at most one worker per core, with one thread each."""
    require(num_workers >= 0, f"num_workers got {num_workers}; expected 0 or more")
    return _load(StreamReader(stream, _read_batch), sampler, num_workers, pin_memory)


def batches_of(loader: DataLoader) -> Generator[Any]:
    """The batches of a loader. Closing the generator ends the workers.

    Raises:
        UserError: of a worker, or if one died; torch finds out within 5 s of waiting for its batch.
    """
    handler, others = signal.getsignal(signal.SIGCHLD), multiprocessing.active_children()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_MAIN)  # all threads of the workers inherit it
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if signal.getsignal(signal.SIGCHLD) is not handler:  # torch's raises wherever training happens to be, on one rank
        signal.signal(signal.SIGCHLD, handler)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    while True:
        try:
            batch = next(batches, None)
        except RuntimeError as error:
            ends = [how_it_ended(worker.exitcode) for worker in workers if worker.exitcode]
            if not ends:
                raise
            advice = "lower num_workers; with --cfg-options num_workers=0 the main process loads"
            raise UserError(f"a worker of the data loader {ends[0]}; {advice}") from error
        if batch is None:
            return
        if isinstance(batch, UserError):
            raise batch
        yield batch


def first_batch(loader: DataLoader) -> Batch:
    """The batch that a loader starts with, read in this process; the loader stays at its start."""
    batch = loader.dataset.__getitems__(next(iter(loader.batch_sampler)))
    if isinstance(batch, UserError):
        raise batch
    return batch


def variation_batches(stream: Stream, batches: Sequence[list[int]], num_workers: int = 0) -> Generator[Any]:
    """`stream.read_variations` of each batch of rows, in order."""
    return batches_of(_load(StreamReader(stream, Stream.read_variations), batches, num_workers))


def _read_batch(stream: Stream, positions: Sequence[int]) -> Batch:
    return collate(stream.__getitems__(positions))


def _load(reader: StreamReader, batches: Any, num_workers: int, pin_memory: bool = False) -> DataLoader:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(num_workers, cores)
    return DataLoader(
        reader, batch_sampler=batches, collate_fn=_identity, num_workers=workers, pin_memory=pin_memory,
        worker_init_fn=_end_with_main if workers else None,
        generator=torch.Generator(),  # without it, torch draws the workers' seeds from the global one
    )  # fmt: skip


def _identity(batch: Any) -> Any:
    return batch


def _end_with_main(worker: int) -> None:
    """In a worker: end with the main process, or on its SIGTERM."""
    parent, folder = multiprocessing.parent_process(), get_temp_dir()  # the folder has the sockets that pass tensors
    assert parent is not None
    main = parent.pid or 0

    def heed_main() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main and os.getppid() == main:
            pass
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)

    threading.Thread(target=heed_main, daemon=True).start()
    distributed.end_with_parent(main, signal.SIGTERM)
