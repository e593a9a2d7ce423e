"""The endless stream of samples: a pure function of (seed, running position).

All randomness of training lives here: everything drawn for a sample comes from a counter-based generator keyed by
(seed, running position). Step s of global batch G takes the positions [s G, (s + 1) G); a position determines epoch
and index. Nothing is stored or replayed, so the step at which a run resumes, and the number of workers or ranks,
change nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import cached_property
from typing import Any, final

import numpy as np

from diffengine.datasets.base import ImageDataset, Sample, Size, UnreadableImage, as_dataset, check_sample
from diffengine.datasets.findings import spread
from diffengine.datasets.shapes import in_runs
from diffengine.datasets.sources import epoch_of
from diffengine.datasets.split import Split, digest_of
from diffengine.datasets.transforms import AnyTransform, apply, effect_of, mirroring
from diffengine.errors import UserError, require

ORDERS_KEPT = 3  # epochs whose order stays in memory: a batch may touch two
# Domains of generators: equal counters in two domains give unrelated draws.
ORDER, IMAGE, SAMPLE, VALIDATION, CAPTION = 0, 1, 2, 3, 4


@final
class Generators:
    """The generators of one (seed, domain): `at(*counter)`, of up to three words, returns that counter's.

    The counter fills Philox's high words and draws count in the low one, so two streams could meet only after 2^64
    draws. One generator is reset for each counter, which is ten times as fast as making a new one: what `at` returned
    before must no longer be used.
    """

    def __init__(self, seed: int, domain: int) -> None:
        require(0 <= seed < 2**64, f"seed got {seed}; expected a whole number from 0 to 2^64 - 1")
        self._bits = np.random.Philox(key=np.array([seed, domain], dtype=np.uint64))
        self._state: Any = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def at(self, *counter: int) -> np.random.Generator:
        self._state["state"]["counter"][1:] = (*counter, *[0] * (3 - len(counter)))
        self._bits.state = self._state
        return self._generator


def generator(seed: int, domain: int, *counter: int) -> np.random.Generator:
    """A new generator for one counter, see `Generators`."""
    return Generators(seed, domain).at(*counter)


@final
class Stream:
    """The samples of a data set by running position, without end: `stream[position]`.

    Args:
        dataset: an ImageDataset, or any object with `__len__` and `__getitem__`.
        image_transforms: change the image. They draw from (seed, position).
        transforms: run after them, and after the caption is drawn and varied, from (seed, position).
        image_variations: with V, image_transforms draw from (seed, index, visit modulo V), where an image's visits are
            how often it was taken before: each has only V variations of crop and flip, which a cache can hold. None
            for a new variation each time.
        vary_caption: a transform of {"text": caption} that draws from (seed, position). None: captions do not vary.
        caption_variations: with V, vary_caption draws from (seed, caption, visit modulo V): each caption has at most V
            variations. None for a new variation each time.
        split: which images are trained; None for all.
        batch_size: with it, an epoch keeps images of one shape in runs that fill steps of so many, as far as it can;
            the sizes of all images are read. None: images are in random order.
        skip_unreadable: replace an image that cannot be decoded by the next readable one, and count the skipped ones
            in `skipped` (int, else 0), with their names in `skipped_names`. By default such an image is an error.

    Attributes:
        caption_variations: of each caption: as given, or one without vary_caption; None for no limit.
        trained: the indices that an epoch takes, an image's as often as its source repeats it.
        cached_sample: (index, visit) -> the sample after the image transforms, from a cache; None to read the data set.

    Raises:
        UserError: the data set is empty; on reading, `UnreadableImage`, or no image can be read.
    """

    def __init__(
        self, dataset: Any, image_transforms: Sequence[AnyTransform], transforms: Sequence[AnyTransform], *,
        seed: int = 0, image_variations: int | None = None, skip_unreadable: bool = False, split: Split | None = None,
        vary_caption: AnyTransform | None = None, caption_variations: int | None = None, batch_size: int | None = None,
    ) -> None:  # fmt: skip
        self.dataset = as_dataset(dataset)
        self.split = split or Split(None, [], [], {})
        require(len(self.dataset) > 0, "the data set is empty; expected at least one image")
        self.sources = self.dataset.sources
        self.trained, self._taken = epoch_of(self.sources, self.split.train)
        self._repeats = None if self._taken is None else np.bincount(np.asarray(self.trained))
        self._ends = np.cumsum([source.images for source in self.sources])
        message = f"image_variations got {image_variations}; expected at least 1, or None for no repeats"
        require(image_variations is None or image_variations >= 1, message)
        self.image_transforms = list(image_transforms)
        self._transforms = [
            self.image_transforms if source.mirror is None else mirroring(self.image_transforms, source.mirror)
            for source in self.sources
        ]
        self.transforms = list(transforms)
        self.seed = seed
        self.image_variations = image_variations
        self.vary_caption = vary_caption
        self.caption_variations = caption_variations if vary_caption else 1
        self.skip_unreadable = skip_unreadable
        self.cached_sample: Callable[[int, int], Sample] | None = None
        self.batch_size = batch_size
        self._orders: dict[int, np.ndarray] = {}
        self._of_images = Generators(seed, IMAGE)
        self._of_samples = Generators(seed, SAMPLE)
        self._of_captions = Generators(seed, CAPTION)

    def __len__(self) -> int:
        """The number of samples of an epoch: of each image that is trained, as many as its source repeats it."""
        return len(self.trained)

    @cached_property
    def variations(self) -> int | None:
        """Variations of each image: `image_variations`, one if the transforms draw nothing, or None for no limit.

        A random crop changes nothing of a square image, so sizes are read, if known, up to the first image that varies.
        """
        if self.dataset.variations is not None:
            return self.dataset.variations
        if not any(effect_of(self.transforms_of(end - 1), None)[1] for end in self._ends):
            return 1
        for index in range(len(self.dataset)):
            with suppress(UnreadableImage):
                size = self.dataset.size(index)
                if size is None or effect_of(self.transforms_of(index), size)[1]:
                    return self.image_variations
        return 1

    @property
    def images(self) -> int:
        """How many images are trained."""
        return len(self.dataset) - len(self.split.held_out)

    def source_rows(self) -> list[dict[str, Any]]:
        """A row per source: its name, path, weight and repeats; images in all, trained; samples of an epoch."""
        kept = range(len(self.dataset)) if self.split.train is None else self.split.train
        trained, samples = (
            np.bincount(np.searchsorted(self._ends, indices, side="right"), minlength=len(self.sources)).tolist()
            for indices in (np.asarray(kept), np.asarray(self.trained))
        )
        return [
            {**asdict(source), "trained": trained[number], "samples": samples[number]}
            for number, source in enumerate(self.sources)
        ]

    def source_of(self, index: int) -> int:
        """The number of the source that an image is of."""
        return int(np.searchsorted(self._ends, index, side="right"))

    def transforms_of(self, index: int) -> list[AnyTransform]:
        """The image transforms of an image: mirrored as its source is."""
        return self._transforms[self.source_of(index)]

    def locate(self, position: int) -> tuple[int, int]:
        """(visit, index into the data set) of a position: how often the image was taken before, the epoch if each is
        taken once. Each epoch is another permutation.
        """
        epoch, entry = self._entry(position)
        index = int(self.trained[entry])
        if self._taken is None or self._repeats is None:
            return epoch, index
        return epoch * int(self._repeats[index]) + int(self._taken[entry]), index

    def _entry(self, position: int) -> tuple[int, int]:
        """(epoch, index into `trained`) of a position."""
        epoch, rank = divmod(position, len(self))
        if epoch not in self._orders:
            if len(self._orders) == ORDERS_KEPT:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = self._order(epoch)
        return epoch, int(self._orders[epoch][rank])

    def _order(self, epoch: int) -> np.ndarray:
        rng = generator(self.seed, ORDER, epoch)
        order = rng.permutation(len(self))
        if self.batch_size is None or self.shapes is None or len(set(self.shapes)) == 1:
            return order
        numbers = {shape: number for number, shape in enumerate(dict.fromkeys(self.shapes))}
        shapes = np.array([numbers[self.shapes[self.trained[rank]]] for rank in order])
        return in_runs(order, shapes, -epoch * len(self) % self.batch_size, self.batch_size, rng)

    @cached_property
    def shapes(self) -> list[Size] | None:
        """(width, height) of each image after the image transforms; None if an epoch is in random order.

        They are read with the first sample, since images may be generated before. One that cannot be read has that of a
        square.
        """
        if self.batch_size is None:
            return None
        if (shapes := self.dataset.shapes()) is not None:
            return shapes

        def shape_of(index: int) -> Size:
            try:
                size = self.dataset.size(index) or check_sample(self.dataset[index])["image"].size
            except UnreadableImage:
                size = (1, 1)
            return effect_of(self.transforms_of(index), size)[0] or size

        with ThreadPoolExecutor() as pool:
            return list(pool.map(shape_of, range(len(self.dataset))))

    def __getitem__(self, position: int) -> Sample:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Sample]:
        """The samples of many positions: read together if the data set can, then processed one by one."""
        samples: list[Sample] = []
        while len(samples) < len(positions):
            rest = positions[len(samples) :]
            try:
                for position, (index, sample) in zip(rest, self._read(rest)):
                    samples.append(self._finish(position, index, sample, []))
            except UnreadableImage:
                if not self.skip_unreadable:
                    raise
                position = positions[len(samples)]
                samples.append(self._finish(position, *self._next_readable(position)))
        return samples

    def read_variations(self, rows: Sequence[int]) -> list[Sample | None]:
        """A cache's rows `index * variations + variation`: samples after the image transforms; None if skipped."""
        assert self.variations is not None
        raw: dict[int, Sample | None] = dict.fromkeys(row // self.variations for row in rows)
        for index in raw:
            with suppress(UnreadableImage) if self.skip_unreadable else nullcontext():
                raw[index] = self.dataset[index]
        samples = []
        for row in rows:
            index, variation = divmod(row, self.variations)
            sample, rng = raw[index], self._of_images.at(index, variation)
            samples.append(None if sample is None else self._transformed(index, sample, rng))
        return samples

    def variations_of(self, caption: str) -> list[str]:
        """The variations of a caption, as many as `caption_variations`; none if it does not vary, or without limit."""
        return [self._variation(caption, number) for number in range(self.caption_variations or 0) if self.vary_caption]

    def fixed_sample(self, index: int) -> Sample:
        """An image after the image transforms, the same in every run: in its first variation, if there are some."""
        if self.cached_sample is not None:
            return self._with_source(index, self.cached_sample(index, 0))
        counter = (index, 0) if self.image_variations is not None else (index, 0, 1)
        sample = self._transformed(index, self.dataset[index], self._of_images.at(*counter))
        return self._with_source(index, sample)

    def fixed_samples(self, indices: Sequence[int]) -> list[tuple[Sample, int]]:
        """Each readable image as of `fixed_sample`, with the digest that the split has of its content."""
        samples = []
        for index in indices:
            with suppress(UnreadableImage):
                samples.append((self.fixed_sample(index), self.split.digests[index]))
        return samples

    def _read(self, positions: Sequence[int]) -> Iterator[tuple[int, Sample]]:
        """(index, sample after the image transforms) of the positions."""
        located = [self.locate(position) for position in positions]
        if self.cached_sample is not None:
            return ((index, self.cached_sample(index, visit)) for visit, index in located)
        raws = self.dataset.__getitems__([index for _, index in located])
        triples = zip(positions, located, raws)
        return ((index, self._transform(position, visit, index, raw)) for position, (visit, index), raw in triples)

    def _transform(self, position: int, visit: int, index: int, raw: Sample) -> Sample:
        counter = (position,) if self.image_variations is None else (index, visit % self.image_variations)
        return self._transformed(index, raw, self._of_images.at(*counter))

    def _transformed(self, index: int, raw: Sample, rng: np.random.Generator) -> Sample:
        return apply(self.transforms_of(index), check_sample(raw), rng)

    def _with_source(self, index: int, sample: Sample) -> Sample:
        """The sample with the number of its source, if there are several, and with the source's weight, if any has one.

        They come after the cache, which so stays valid when they change.
        """
        if len(self.sources) == 1 and self.sources[0].weight == 1:
            return sample
        number = self.source_of(index)
        source = np.zeros(len(self.sources), dtype=np.float32)
        source[number] = 1
        found = {**sample, "source": source} if len(source) > 1 else dict(sample)
        if any(one.weight != 1 for one in self.sources):
            found["weight"] = sample.get("weight", 1.0) * self.sources[number].weight
        return found

    def _finish(self, position: int, index: int, sample: Sample, skipped: list[str]) -> Sample:
        rng = self._of_samples.at(position)
        share = rng.random()  # drawn for a single caption too, so that the draws after it stay the same
        sample = self._with_source(index, sample)
        text = sample["text"]
        if not isinstance(text, str):
            sample = {**sample, "text": text[int(share * len(text))]}
        if self.vary_caption is not None:
            sample = {**sample, "text": self._varied(sample["text"], position)}
        names = {"skipped_names": skipped} if self.skip_unreadable else {}
        return {**apply(self.transforms, sample, rng), "skipped": len(skipped), **names}

    def _varied(self, caption: str, position: int) -> str:
        """The caption's variation at a position."""
        if self.caption_variations is not None:
            return self._variation(caption, self.locate(position)[0] % self.caption_variations)
        assert self.vary_caption is not None
        return self.vary_caption({"text": caption}, self._of_captions.at(position))["text"]

    def _variation(self, caption: str, number: int) -> str:
        """One of the `caption_variations` of a caption: the same wherever the data has this caption."""
        assert self.vary_caption is not None
        return self.vary_caption({"text": caption}, self._of_captions.at(digest_of(caption.encode()), number))["text"]

    def _next_readable(self, position: int) -> tuple[int, Sample, list[str]]:
        """(index, sample, the names of those skipped) of the first readable image from this position's index on."""
        visit, start = self.locate(position)[0], self._entry(position)[1]
        skipped: list[str] = []
        for number in range(len(self)):
            index = int(self.trained[(start + number) % len(self)])
            try:
                if self.cached_sample is not None:
                    return index, self.cached_sample(index, visit), skipped
                return index, self._transform(position, visit, index, self.dataset[index]), skipped
            except UnreadableImage as error:
                last = error
                skipped.append(self.dataset.name(index))
        raise UserError(f"none of the {len(self)} images can be read; the last: {last}")


def fixed_samples_of(
    dataset: ImageDataset, transforms: Sequence[AnyTransform], seed: int, most: int
) -> list[tuple[Sample, int]]:
    """At most so many images of another data set after image transforms, each with the digest of its content."""
    samples = []
    for index in spread(len(dataset), most):
        with suppress(UnreadableImage):
            digest = digest_of(dataset.content(index) or repr(index).encode())
            samples.append((apply(transforms, dataset[index], generator(seed, VALIDATION, digest, 1)), digest))
    return samples


def steps_for_epochs(epochs: int, num_samples: int, batch_size: int) -> int:
    """Steps until `epochs` epochs are complete: an epoch ends with the first step that reaches its end."""
    return -(-epochs * num_samples // batch_size)
