"""What was found in a data set: damage, sizes, duplicates and captions, and what to say of them."""

import os
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from diffengine.datasets.base import Size
from diffengine.datasets.shapes import Shapes
from diffengine.text import shortened

GOLDEN_RATIO = 0.6180339887498949
MOST_COUNTED = 1000  # captions whose tokens are counted, for the same reason
MOST_WORDS = 60  # of a caption, of which the tokens are not counted, without a warning
NEAR_BITS, NEAR_LEVELS = 6, 8.0  # of 64 bits and of 256 levels, by which near duplicates may differ
ENLARGED = 1.1  # times, above which it shows
MOST_COMPARED = 20_000
NAMED = 5  # images in a message
SHAPES_SHOWN = 4
SHOWN = 80  # characters of what a caption loses
BARS = 12

Lengths = Callable[[Sequence[str]], tuple[list[int], int]]


@dataclass(frozen=True)
class ImageFacts:
    """What is known of one image.

    Attributes:
        index: into the data set.
        size: (width, height) in pixels, upright; None if it is not known.
        problem: why it cannot be read.
        decoded: whether it was, to its end.
        masked: whether it has a mask.
        content: equal for equal files.
        bits: 64 of a perceptual hash; None of a flat image.
        levels: (64 * 3,) its colours at 8 x 8.
    """

    index: int
    name: str
    size: Size | None = None
    problem: str | None = None
    decoded: bool = False
    masked: bool = False
    content: bytes | None = None
    bits: int | None = None
    levels: np.ndarray | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Findings:
    """What `inspect` found.

    Attributes:
        images: those that were looked at, each file once.
        count: of all images.
        looked: how many were looked at.
        captions: of each image in the data set.
        shapes: in which images are trained; None if that is not known.
        lengths: the number of tokens of each of these captions, and the most that the model reads of one (0: none).
            None if there is no model.
    """

    images: list[ImageFacts]
    count: int
    looked: int
    captions: list[list[str]]
    names: Callable[[int], str]
    shapes: Shapes | None = None
    lengths: Lengths | None = None

    @cached_property
    def unreadable(self) -> list[ImageFacts]:
        return [image for image in self.images if image.problem]

    @cached_property
    def sized(self) -> list[ImageFacts]:
        return [image for image in self.images if image.size]

    @cached_property
    def enlarged(self) -> list[ImageFacts]:
        """Images that are clearly smaller than their shape, the smallest first."""
        if self.shapes is None:
            return []
        small = [(self.shapes.scale(image.size), image) for image in self.sized if image.size]
        return [image for scale, image in sorted(small, key=lambda pair: -pair[0]) if scale > ENLARGED]

    @cached_property
    def shape_counts(self) -> dict[Size, int]:
        """How many images are trained in which shape, the most frequent first."""
        sizes = [image.size for image in self.sized if image.size]
        return dict(Counter(map(self.shapes.of, sizes)).most_common()) if self.shapes else {}

    @cached_property
    def duplicates(self) -> list[list[ImageFacts]]:
        """Groups of equal files."""
        groups: dict[bytes, list[ImageFacts]] = defaultdict(list)
        for image in self.images:
            if image.content and not image.problem:
                groups[image.content].append(image)
        return [group for group in groups.values() if len(group) > 1]

    @cached_property
    def near_duplicates(self) -> list[list[ImageFacts]]:
        """Groups of images that look alike and are different files."""
        again = {image.index for group in self.duplicates for image in group[1:]}
        return look_alikes([image for image in self.images if image.bits is not None and image.index not in again])

    @cached_property
    def empty(self) -> list[int]:
        """Images with a caption that is blank."""
        return [index for index, texts in enumerate(self.captions) if any(not text.strip() for text in texts)]

    @cached_property
    def repeated(self) -> dict[str, int]:
        """How many images have a caption, of those that several have; {} if all have the same."""
        counts = Counter(text for texts in self.captions for text in set(texts) if text.strip())
        return {} if len(counts) <= 2 else {text: count for text, count in counts.most_common() if count > 1}

    @cached_property
    def tags(self) -> dict[str, int]:
        """How many captions have a tag, the most frequent first; {} unless most captions are lists of tags."""
        split = [[tag.strip() for tag in text.split(",") if tag.strip()] for texts in self.captions for text in texts]
        tagged = [tags for tags in split if len(tags) >= 3 and sum(len(tag.split()) for tag in tags) <= 3 * len(tags)]
        return (
            dict(Counter(tag for tags in tagged for tag in tags).most_common()) if 2 * len(tagged) > len(split) else {}
        )

    @cached_property
    def cut(self) -> list[tuple[str, int]]:
        """Captions that are longer than the model reads, with their tokens, the longest first."""
        if self.lengths is None:
            return []
        known = self.counted
        tokens, most = self.lengths(known)
        return sorted(((t, n) for t, n in zip(known, tokens) if most and n > most), key=lambda pair: -pair[1])

    @cached_property
    def counted(self) -> list[str]:
        """The captions whose tokens are counted."""
        texts = [text for each in self.captions for text in each]
        return [texts[index] for index in evenly(len(texts), MOST_COUNTED)]

    @property
    def summary(self) -> str:
        """One line: how many images of which sizes, and what the crop costs."""
        decoded = sum(image.decoded or bool(image.problem) for image in self.images)
        notes = [f"{self.looked:,} looked at"] if self.looked < self.count else []
        notes += [f"{decoded:,} decoded"] if 0 < decoded < len(self.images) else []
        masked = sum(image.masked for image in self.images)
        notes += [f"{masked:,} with a mask"] if masked else []
        line = f"{self.count:,} images" + (f" ({', '.join(notes)})" if notes else "")
        if not self.sized:
            return line
        sizes = [image.size for image in self.sized if image.size]
        low, high = min(sizes, key=min), max(sizes, key=min)
        line += f" of {_times(low)}" if low == high else f" from {_times(low)} to {_times(high)}"
        if self.shapes is None:
            return line
        square = f"the {self.shapes.side} px square cuts off {self.shapes.square.lost(sizes):.1%} of the area"
        if len(self.shapes.all) == 1:
            return f"{line}; {square}"
        counts = self.shape_counts
        most = listed((f"{_times(shape)} {count:,}" for shape, count in counts.items()), SHAPES_SHOWN)
        shapes = "1 shape" if len(counts) == 1 else f"{len(counts)} shapes"
        return f"{line}; {shapes} ({most}) cut off {self.shapes.lost(sizes):.1%}, {square}"

    def warnings(self, near: bool = False) -> list[str]:
        """What hurts but does not stop a run, the worst first; with `near`, images that look alike are compared."""
        found = []
        if self.unreadable:
            found.append(f"{_are(self.unreadable, 'image')} not readable: {self._named(self.unreadable)}")
        if self.empty:
            found.append(f"{_are(self.empty, 'caption')} empty: {listed(map(self.short, map(self.names, self.empty)))}")
        found += self.cut_captions()
        if self.enlarged:
            smallest = self.enlarged[0]
            of = f"the smallest {_times(smallest.size)}" if smallest.size else ""
            found.append(f"{_are(self.enlarged, 'image')} enlarged, {of}: {self._named(self.enlarged)}")
        if self.duplicates:
            extra = sum(len(group) - 1 for group in self.duplicates)
            pairs = (" = ".join(self.short(image.name) for image in group) for group in self.duplicates)
            found.append(f"{extra:,} {'image is a copy' if extra == 1 else 'images are copies'}: {listed(pairs)}")
        if near and self.near_duplicates:
            groups = (" ~ ".join(self.short(image.name) for image in group) for group in self.near_duplicates)
            are = "group looks" if len(self.near_duplicates) == 1 else "groups look"
            found.append(f"{len(self.near_duplicates)} {are} alike: {listed(groups)}")
        if self.repeated:
            text, count = next(iter(self.repeated.items()))
            found.append(
                f"{len(self.repeated)} captions are of several images, {count} have '{shortened(text, SHOWN)}'"
            )
        return found

    def cut_captions(self) -> list[str]:
        """A line on captions that the model does not read to their end, and what the longest loses."""
        if self.lengths is None:
            counts = [len(text.split()) for texts in self.captions for text in texts]
            long = sum(count > MOST_WORDS for count in counts)
            are = "caption has" if long == 1 else "captions have"
            read = "a text encoder of 77 tokens, such as CLIP's, reads about 55"
            return [f"{long:,} {are} more than {MOST_WORDS} words, the longest {max(counts):,}; {read}"] if long else []
        if not self.cut:
            return []
        text, tokens = self.cut[0]
        most, lost = self.lengths([""])[1], lost_words(text, self.lengths)
        loss = f"loses its last {len(lost)} word{'' if len(lost) == 1 else 's'}: '{shortened(' '.join(lost), SHOWN)}'"
        sampled = f" of {len(self.counted):,}" if len(self.counted) < sum(map(len, self.captions)) else ""
        are = "caption is" if len(self.cut) == 1 else "captions are"
        return [f"{len(self.cut):,}{sampled} {are} longer than {most} tokens; the longest has {tokens} and {loss}"]

    def facts(self) -> dict[str, Any]:
        """What is shown besides the warnings, as plain data: texts by name, and counts by what is counted."""
        pairs, charts = {"images": f"{self.count:,}"}, {}
        sizes = [image.size for image in self.sized if image.size]
        if sizes:
            low, high = min(sizes, key=min), max(sizes, key=min)
            pairs["sizes"] = _times(low) if low == high else f"{_times(low)} to {_times(high)}"
            charts["Short sides in pixels"] = histogram([min(size) for size in sizes])
        if sizes and self.shapes is not None:
            pairs["cut off"] = f"{self.shapes.lost(sizes):.1%} of the area"
            if len(self.shapes.all) > 1:
                pairs["cut off"] += f"; {self.shapes.square.lost(sizes):.1%} by the {self.shapes.side} px square"
                pairs["shapes"] = listed(
                    (f"{_times(shape)} {n:,}" for shape, n in self.shape_counts.items()), SHAPES_SHOWN
                )
                charts["Shapes"] = [[_times(shape), count] for shape, count in self.shape_counts.items()][:BARS]
        texts = [text for each in self.captions for text in each]
        if texts:
            unit, counts = "words", [len(text.split()) for text in texts]
            if self.lengths is not None and self.lengths([])[1]:
                unit, counts = "tokens", self.lengths(self.counted)[0]
                pairs["read of a caption"] = f"{self.lengths([])[1]} tokens"
            few, many = min(counts), max(counts)
            pairs["captions"] = f"{len(texts):,}, {len(set(texts)):,} distinct, {few:,} to {many:,} {unit}"
            charts[f"{unit.capitalize()} per caption"] = histogram(counts)
        if self.tags:
            pairs["tags"] = f"{len(self.tags):,}: {listed(f'{tag} {count:,}' for tag, count in self.tags.items())}"
            charts["Tags"] = [[tag, count] for tag, count in self.tags.items()][:BARS]
        return {"pairs": pairs, "charts": charts}

    def short(self, name: str) -> str:
        """A file's name without the folder that all images are in."""
        return os.path.relpath(name, self._folder) if self._folder else name

    @cached_property
    def _folder(self) -> str:
        folders = {os.path.dirname(image.name) for image in self.images}
        return (
            os.path.commonpath(folders) if folders and all(folders) and len({*map(os.path.isabs, folders)}) == 1 else ""
        )

    def _named(self, images: Sequence[ImageFacts]) -> str:
        return listed(self.short(image.name) for image in images)


def look_alikes(images: Sequence[ImageFacts]) -> list[list[ImageFacts]]:
    """Groups of images whose perceptual hashes and colours nearly agree.

    The hash is a difference hash: whether each of 8 x 8 grey cells is brighter than the one to its left.
    """
    known = [image for image in images[:MOST_COMPARED] if image.bits is not None and image.levels is not None]
    if not known:
        return []
    bits = np.array([image.bits for image in known], dtype=np.uint64)
    levels = np.stack([image.levels for image in known if image.levels is not None])
    group = np.arange(len(known))
    for at in range(1, len(known)):
        apart = _ones(bits[:at] ^ bits[at])
        for near in np.flatnonzero(apart <= NEAR_BITS):
            if np.abs(levels[near] - levels[at]).mean() <= NEAR_LEVELS and group[near] != group[at]:
                group[group == group[at]] = group[near]
    groups: dict[int, list[ImageFacts]] = defaultdict(list)
    for number, image in zip(group.tolist(), known):
        groups[number].append(image)
    return [members for members in groups.values() if len(members) > 1]


def _ones(words: np.ndarray) -> np.ndarray:
    """How many bits of each 64-bit word are set."""
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)


def lost_words(text: str, lengths: Lengths) -> list[str]:
    """The last words of a caption, which the model does not read."""
    words, most = text.split(), lengths([])[1]
    read = bisect_right(range(1, len(words)), most, key=lambda count: lengths([" ".join(words[:count])])[0][0])
    return words[read:]


def histogram(values: Sequence[int]) -> list[list[Any]]:
    """[range, count] of whole numbers in at most `BARS` ranges of equal width."""
    low, high = min(values), max(values)
    width = -(-(high - low + 1) // BARS)
    counts = Counter((value - low) // width for value in values)
    starts = [(low + bar * width, counts.get(bar, 0)) for bar in range((high - low) // width + 1)]
    return [[str(at) if width == 1 else f"{at}–{at + width - 1}", count] for at, count in starts]


def evenly(count: int, most: int) -> list[int]:
    """At most so many of `count` indices, evenly spaced."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()


def spread(total: int, count: int) -> list[int]:
    """`count` of `total` indices, rising, spread by the golden ratio: equal steps would coincide with groups."""
    return sorted(sorted(range(total), key=lambda index: index * GOLDEN_RATIO % 1)[:count])


def listed(names: Iterable[str], most: int = NAMED) -> str:
    """ "a, b, c and 7 more"."""
    known = list(names)
    more = f" and {len(known) - most:,} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more


def _are(things: Sequence[object], what: str) -> str:
    return f"{len(things):,} {what} is" if len(things) == 1 else f"{len(things):,} {what}s are"


def _times(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
