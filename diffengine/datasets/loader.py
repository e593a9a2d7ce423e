"""From the stream to batches: how steps, ranks and workers slice it, and how samples are collated."""

import math
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, final

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from diffengine.datasets.base import Sample
from diffengine.datasets.stream import Stream
from diffengine.errors import UserError

Batch = dict[str, Any]


@final
class PositionSampler(Sampler[list[int]]):
    """For each step, this rank's share of the step's positions, in order.

    Args:
        batch_size: of all ranks together.
        rank, world_size: default 0 of 1.
        start_step: the first step, default 0.
        num_steps: the step to stop before, counted from 0 and not from start_step; default no end.

    Raises:
        UserError: a rank would get nothing.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        num_steps: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size got {batch_size}; expected at least 1")
        if batch_size < world_size:
            raise UserError(
                f"batch size {batch_size} is split over {world_size} processes; expected at least one sample for each; "
                f"set it to {world_size} or more, or start fewer processes"
            )
        assert 0 <= rank < world_size
        self.start_step = start_step
        self.num_steps = num_steps
        self.batch_size = batch_size
        self._first = rank * batch_size // world_size
        self._end = (rank + 1) * batch_size // world_size

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while self.num_steps is None or step < self.num_steps:
            start = step * self.batch_size
            yield list(range(start + self._first, start + self._end))
            step += 1

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("a PositionSampler without num_steps has no end, so no length")
        return max(0, self.num_steps - self.start_step)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack tensors; everything else becomes a list that stays on the host: texts, ints, ragged numpy arrays.

    `num_targets`, the number of tokens of each sample that the loss counts, is 1 each unless a transform set it.
    `weight`, by which each of them counts in the loss, is present if any sample has one; the others' is 1.

    Raises:
        UserError: tensors of different shapes, or a weight that is not a finite number above 0.
    """
    batch: Batch = {"num_targets": [1] * len(samples)}
    if any("weight" in sample for sample in samples):
        samples = [{**sample, "weight": _weight(sample)} for sample in samples]
    for key, value in samples[0].items():
        values = [sample[key] for sample in samples]
        if isinstance(value, torch.Tensor):
            shapes = {tuple(tensor.shape) for tensor in values}
            if len(shapes) > 1:
                got = ", ".join(map(str, sorted(shapes)))
                raise UserError(
                    f"samples of one batch have {key} of shapes {got}; expected one shape; put Resize and Crop of one "
                    "size among the image transforms"
                )
            batch[key] = torch.stack(values)
        else:
            batch[key] = values
    return batch


def _weight(sample: Sample) -> float:
    weight = float(sample.get("weight", 1.0))
    if not 0 < weight < math.inf:  # so no step has a total weight of 0
        raise UserError(f"a sample got weight {weight}; expected a finite number above 0")
    return weight


@final
class StreamReader(Dataset):
    """Reads lists of positions or rows. A UserError is returned as a value: torch would put a traceback into its text.

    Attributes:
        stream: what is read.
    """

    def __init__(self, stream: Stream, read: Callable[[Stream, Sequence[int]], Any]) -> None:
        self.stream = stream
        self._read = read

    def __getitems__(self, indices: Sequence[int]) -> Any:
        try:
            return self._read(self.stream, indices)
        except UserError as error:
            return error


def make_loader(stream: Stream, sampler: PositionSampler, num_workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """A loader of collated batches, to be read by `batches_of`. Its workers use one thread each.

    Args:
        stream, sampler: what to read, in which order.
        num_workers: processes, at most one per core.
        pin_memory: copy batches into pinned memory.

    Raises:
        UserError: a negative number of workers.
    """
    if num_workers < 0:
        raise UserError(f"num_workers got {num_workers}; expected 0 or more")
    return _load(StreamReader(stream, _read_batch), sampler, num_workers, pin_memory)


def batches_of(loader: DataLoader) -> Generator[Any]:
    """The batches of a loader. Closing the generator ends its workers.

    Raises:
        UserError: one that a worker returned.
    """
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def variation_batches(stream: Stream, batches: Sequence[list[int]], num_workers: int = 0) -> Generator[Any]:
    """`stream.read_variations` of each batch of rows, in order."""
    return batches_of(_load(StreamReader(stream, Stream.read_variations), batches, num_workers))


def _read_batch(stream: Stream, positions: Sequence[int]) -> Batch:
    return collate(stream.__getitems__(positions))


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load(reader: StreamReader, batches: Any, num_workers: int, pin_memory: bool = False) -> DataLoader:
    workers = min(num_workers, cores())
    return DataLoader(
        reader,
        batch_sampler=batches,
        collate_fn=_identity,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_main if workers else None,
        generator=torch.Generator(),  # torch would otherwise draw the workers' seeds from the global one
    )


def _identity(batch: Any) -> Any:
    return batch


def _leave_signals_to_main(worker: int) -> None:
    """In a worker: ignore a Ctrl-C or SIGTERM that goes to the whole process group, which the main process handles.

    The main process finishes its step and saves. A worker that died of the signal would make torch end the step in the
    middle. A SIGTERM that the main process itself sends still counts.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def heed_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=heed_parent, daemon=True).start()
