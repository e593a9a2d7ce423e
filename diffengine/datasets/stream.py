"""The endless stream of samples, and how steps, ranks and workers slice it.

All randomness of training lives here: whatever is drawn for a sample comes from (seed, running position) by a
counter-based generator. Step s of global batch G takes the positions [s G, (s + 1) G); a position says epoch
and index. Nothing is stored or replayed: where a run goes on, and with how many workers or ranks, changes
nothing.
"""

import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import IntEnum
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from diffengine.datasets.images import Sample, UnreadableImage
from diffengine.datasets.transforms import Transform, draws_matter
from diffengine.errors import UserError

Batch = dict[str, Any]

ORDERS_KEPT = 3  # epochs whose order stays in memory: a batch may touch two


class Domain(IntEnum):
    """What a generator's draws are for. Equal counters in two domains give unrelated draws."""

    ORDER = 0
    IMAGE = 1
    SAMPLE = 2


class Images(Protocol):
    """What a data set offers. With `__getitems__(indices) -> samples` as well, batches are read at once."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


class Forms(Protocol):
    """Every form of every image, made before: what a stream has after its image transforms."""

    def sample(self, index: int, epoch: int, /) -> Sample: ...


class Generators:
    """The generators of one (seed, domain): `at(*counter)`, of up to three words, gives that counter's.

    The counter fills Philox's high words and the draws count in the low one, so two streams could only meet
    after 2^64 draws. One generator is set anew, ten times as fast as making one: what `at` gave before is no
    longer to be used. Raises UserError for a seed outside of [0, 2^64).
    """

    def __init__(self, seed: int, domain: int) -> None:
        if not 0 <= seed < 2**64:
            raise UserError(f"seed got {seed}; expected a whole number from 0 to 2^64 - 1")
        self._bits = np.random.Philox(key=np.array([seed, domain], dtype=np.uint64))
        self._state: Any = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def at(self, *counter: int) -> np.random.Generator:
        self._state["state"]["counter"][1:] = (*counter, *[0] * (3 - len(counter)))
        self._bits.state = self._state
        return self._generator


def generator(seed: int, domain: int, *counter: int) -> np.random.Generator:
    """A generator of its own, see `Generators`."""
    return Generators(seed, domain).at(*counter)


class Stream(Dataset):
    """The samples of a data set by running position, without end; `stream[position]` is a pure function.

    dataset: gives {"image": PIL RGB, "text": str or list of str}; of a list one caption is drawn.
    image_transforms: change the image. They draw from (seed, position), or, with image_variations=V, from
        (seed, index, epoch modulo V): then an image has only V forms, which a cache can hold.
    transforms: run after them, and after the caption is drawn, from (seed, position).
    seed: default 0.
    cache: where the images' forms come from instead, once it is set; they are equal.
    skip_unreadable: put the next readable image in the place of one that cannot be decoded, and count the
        steps taken in `skipped` (int, else 0). By default it is an error.

    Raises UnreadableImage, and UserError where no image can be read at all.
    """

    def __init__(
        self,
        dataset: Images,
        image_transforms: Sequence[Transform],
        transforms: Sequence[Transform],
        *,
        seed: int = 0,
        image_variations: int | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        if len(dataset) == 0:
            raise UserError("the data set is empty; expected at least one image")
        if image_variations is not None and image_variations < 1:
            raise UserError(f"image_variations got {image_variations}; expected at least 1, or None for no repeats")
        self.dataset = dataset
        self.image_transforms = list(image_transforms)
        self.transforms = list(transforms)
        self.seed = seed
        self.image_variations = image_variations
        self.skip_unreadable = skip_unreadable
        self.cache: Forms | None = None
        self._orders: dict[int, np.ndarray] = {}
        self._of_images = Generators(seed, Domain.IMAGE)
        self._of_samples = Generators(seed, Domain.SAMPLE)

    @cached_property
    def forms(self) -> int | None:
        """How many forms an image has: `image_variations`, one where no draw changes any, or no end (None).

        A random crop changes nothing of images that are square already. So sizes are looked at, up to the
        first image that varies, where the data set has `size(index)`; one whose images are elsewhere says
        its `forms`.
        """
        if hasattr(self.dataset, "forms"):
            return self.dataset.forms
        return self.image_variations if self._varies() else 1

    def _varies(self) -> bool:
        if not draws_matter(self.image_transforms, None):
            return False
        size_of = getattr(self.dataset, "size", None)
        if not callable(size_of):
            return True
        for index in range(len(self.dataset)):
            with suppress(UnreadableImage):
                if draws_matter(self.image_transforms, size_of(index)):
                    return True
        return False

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, index into the data set) of a position; each epoch is a permutation of its own."""
        epoch, place = divmod(position, len(self.dataset))
        if epoch not in self._orders:
            if len(self._orders) == ORDERS_KEPT:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = generator(self.seed, Domain.ORDER, epoch).permutation(len(self.dataset))
        return epoch, int(self._orders[epoch][place])

    def __getitem__(self, position: int) -> Sample:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Sample]:
        """The samples of many positions: read at once where the data set can, then handled one by one."""
        samples: list[Sample] = []
        while len(samples) < len(positions):
            rest = positions[len(samples) :]
            try:
                for position, image in zip(rest, self._images(rest)):
                    samples.append(self._finish(position, image, skipped=0))
            except UnreadableImage:
                if not self.skip_unreadable:
                    raise
                position = positions[len(samples)]
                samples.append(self._finish(position, *self._next_readable(position)))
        return samples

    def image_forms(self, rows: Sequence[int]) -> list[Sample | None]:
        """For a cache: row `index * forms + variation` after the image transforms, each image read once.

        None for an image that cannot be read, where those are skipped.
        """
        assert self.forms is not None
        raw: dict[int, Sample | None] = {}
        for index in dict.fromkeys(row // self.forms for row in rows):
            try:
                raw[index] = self.dataset[index]
            except UnreadableImage:
                if not self.skip_unreadable:
                    raise
                raw[index] = None
        samples = []
        for row in rows:
            index, variation = divmod(row, self.forms)
            image, rng = raw[index], self._of_images.at(index, variation)
            samples.append(None if image is None else _run(self.image_transforms, image, rng))
        return samples

    def _images(self, positions: Sequence[int]) -> Iterator[Sample]:
        """What the positions' images are after the image transforms."""
        places = [self.locate(position) for position in positions]
        if self.cache is not None:
            for epoch, index in places:
                yield self.cache.sample(index, epoch)
            return
        read_many = getattr(self.dataset, "__getitems__", None)
        indices = [index for _, index in places]
        raws = read_many(indices) if read_many else (self.dataset[index] for index in indices)
        for position, (epoch, index), raw in zip(positions, places, raws):
            yield self._transform(position, epoch, index, raw)

    def _transform(self, position: int, epoch: int, index: int, raw: Sample) -> Sample:
        counter = (position,) if self.image_variations is None else (index, epoch % self.image_variations)
        return _run(self.image_transforms, raw, self._of_images.at(*counter))

    def _finish(self, position: int, image: Sample, skipped: int) -> Sample:
        rng = self._of_samples.at(position)
        share = rng.random()  # drawn for a single caption too, so that the draws after it stay the same
        text = image["text"]
        if not isinstance(text, str):
            image = {**image, "text": text[int(share * len(text))]}
        return {**_run(self.transforms, image, rng), "skipped": skipped}

    def _next_readable(self, position: int) -> tuple[Sample, int]:
        """(image, steps taken) of the first readable one from this position's index on."""
        epoch, first = self.locate(position)
        for skipped in range(len(self.dataset)):
            index = (first + skipped) % len(self.dataset)
            try:
                if self.cache is not None:
                    return self.cache.sample(index, epoch), skipped
                return self._transform(position, epoch, index, self.dataset[index]), skipped
            except UnreadableImage as error:
                last = error
        raise UserError(f"none of the {len(self.dataset)} images can be read; the last: {last}")


def _run(transforms: Sequence[Transform], sample: Sample, rng: np.random.Generator) -> Sample:
    for transform in transforms:
        sample = transform(sample, rng)
    return sample


def steps_for_epochs(epochs: int, num_samples: int, batch_size: int) -> int:
    """Steps until `epochs` epochs are through: the last one ends with the first step that reaches its end."""
    return -(-epochs * num_samples // batch_size)


class PositionSampler(Sampler[list[int]]):
    """For each step, this rank's share of the step's positions, in order.

    batch_size: of all ranks together. rank, world_size: default 0 of 1. start_step: the first step to give,
    default 0. num_steps: the step to stop before, counted from 0 and not from start_step; default
    without end. Raises UserError where a rank would get nothing.
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
                f"batch size {batch_size} is split over {world_size} processes; expected at least one "
                f"sample for each; set it to {world_size} or more, or start fewer processes"
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
    """Tensors are stacked; all else becomes a list that stays on the host: texts, ints, ragged numpy arrays.

    `num_targets`, how many tokens of each sample the loss counts, is 1 each where no transform set it.
    `weight`, what each of them counts in the loss, is there if any sample has one; the others' is 1.
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
                    f"samples of one batch have {key} of shapes {got}; expected one shape; "
                    "put Resize and Crop of one size among the image transforms"
                )
            batch[key] = torch.stack(values)
        else:
            batch[key] = values
    return batch


def _weight(sample: Sample) -> float:
    """A sample's weight in the loss. Above 0, so that no step is without any."""
    weight = float(sample.get("weight", 1.0))
    if not 0 < weight < math.inf:
        raise UserError(f"a sample got weight {weight}; expected a finite number above 0")
    return weight


class _Batches(Dataset):
    """The stream by lists of positions, collated. A UserError is handed over as a value.

    Raised in a worker, torch would put a whole traceback into its text.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __getitems__(self, positions: Sequence[int]) -> Batch | UserError:
        try:
            return collate(self.stream.__getitems__(positions))
        except UserError as error:
            return error


class _Loader(DataLoader):
    """Raises in the main process what a worker handed over."""

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


def _same(batch: Any) -> Any:
    return batch


def make_loader(stream: Stream, sampler: PositionSampler, num_workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """A loader of collated batches; its workers live as long as its iterator does and use one thread each.

    num_workers: processes, one per core at most. The loader has a generator of its own, since torch would
    otherwise draw the workers' seeds from the global one.
    """
    if num_workers < 0:
        raise UserError(f"num_workers got {num_workers}; expected 0 or more")
    return _loader(_Batches(stream), sampler, num_workers, pin_memory)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _FormsByRow(Dataset):
    """The stream's forms by lists of rows. A UserError is handed over as a value, as in `_Batches`."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __getitems__(self, rows: Sequence[int]) -> list[Sample | None] | UserError:
        try:
            return self.stream.image_forms(rows)
        except UserError as error:
            return error


def form_loader(stream: Stream, chunks: Sequence[list[int]], num_workers: int = 0) -> DataLoader:
    """`stream.image_forms` of each chunk of rows, in order."""
    return _loader(_FormsByRow(stream), chunks, num_workers)


def _loader(dataset: Dataset, batches: Any, num_workers: int, pin_memory: bool = False) -> DataLoader:
    workers = min(num_workers, cores())
    return _Loader(
        dataset,
        batch_sampler=batches,
        collate_fn=_same,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_main if workers else None,
        generator=torch.Generator(),
    )


def _leave_signals_to_main(worker: int) -> None:
    """In a worker: a Ctrl-C or SIGTERM that went to the whole process group is the main process's affair.

    It finishes its step and saves; a worker that died of the signal would make torch end it in the middle.
    What the main process itself sends still counts.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def heed_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=heed_parent, daemon=True).start()
