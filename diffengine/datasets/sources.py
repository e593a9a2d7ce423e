"""Several sources of captioned images as one data set: each with its own options, repeats, weight and mirroring."""

import math
from bisect import bisect_right
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cached_property
from inspect import signature
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, final

import numpy as np

from diffengine.datasets.base import ImageDataset, Sample, Size, Source, UnreadableImage, as_dataset
from diffengine.datasets.folder import Problems, UnusableData, is_image, list_files
from diffengine.datasets.image_text import ImageTextDataset
from diffengine.datasets.missing import MissingImages
from diffengine.errors import UserError, require
from diffengine.files import expanded, is_inside
from diffengine.registry import build, resolve
from diffengine.signatures import problems_against
from diffengine.text import did_you_mean, one_line, shown

LOCATION = ("path", "data", "class_data")  # options that locate a data set and do not change what it returns
USE = ("name", "repeats", "weight", "hold_out", "prior_loss_weight")  # how training takes what it returns


@dataclass(frozen=True, kw_only=True)
class Item:
    """One item of a list of sources: a path, or a dict of these and of the data set's own options.

    Attributes:
        path: as of ImageTextDataset.
        name: default the last component of the path.
        repeats, weight, mirror: as of `Source`.
        hold_out: whether images of it may be held out of training to validate.
        generate: use so many images, the first by path; the run generates those that the folder lacks before training,
            with the base model and `caption` as prompt, and records in `drawn.json` what generated them: they serve no
            other prompt and no other base. None of them is held out.
        generation: options of that, as of previews: `dict(guidance_scale=4.0)`.
        options: the data set's.
    """

    path: str
    name: str | None = None
    repeats: int | Literal["balance"] = 1
    weight: float = 1.0
    mirror: float | None = None
    hold_out: bool = True
    generate: int | None = None
    generation: dict | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def open(self, cls: Callable[..., ImageDataset]) -> ImageDataset:
        """The images."""
        if self.generate is None:
            return cls(self.path, **self.options)
        return GeneratedImages(self.path, self.options, self.generate, self.generation or {})


OWN = [one.name for one in fields(Item) if one.name != "options"]
MOST_REPEATS, LONGEST_EPOCH = 10**6, 10**8  # samples; their order is in memory


@final
class Sources(ImageDataset):
    """Several sources of images as one data set, in which each image has one index.

    How often an epoch takes a source's images, their weight and how they are mirrored is in `sources`; the stream heeds
    it. The sources are opened when the first image is asked for.

    Args:
        items: paths, or `dict(path=...)` with options of `Item` and of the data set.
        options: of the data set, for all items that do not set them.
        cls: the data set of each item.

    Raises:
        UserError: an item's options are wrong; on opening, which items cannot be used, and why.
    """

    def __init__(
        self, items: Sequence[Any], options: Mapping[str, Any] | None = None,
        cls: Callable[..., ImageDataset] = ImageTextDataset,
    ) -> None:  # fmt: skip
        require(len(items) > 0, "data got []; expected a path, or a list of paths or dict(path=...)")
        self._cls = cls
        problems: list[str] = []
        self.items = [_read(item, f"data[{number}]", options or {}, cls, problems) for number, item in enumerate(items)]
        require(not problems, "; ".join(problems))
        self._names = _distinct([item.name or _name_of(item.path) for item in self.items])
        self._check_apart()

    @cached_property
    def datasets(self) -> list[ImageDataset]:
        """Each source's images."""
        opened: list[ImageDataset] = []
        images: list[Path] = []
        problems = Problems()
        for number, item in enumerate(self.items):
            label = f"data[{number}] ('{item.path}')"
            try:
                dataset = item.open(self._cls)
                require(len(dataset) > 0, "no images")
                opened.append(dataset)
            except UserError as error:
                if not self._many:
                    raise
                if isinstance(error, UnusableData):
                    images += error.images
                    problems.extend(error.found, label)
                else:
                    problems.add("sources", f"{label}: {one_line(error)}")
        for dataset in opened if problems.count else ():  # so that all that is wrong is found at once
            with suppress(UserError):
                images += [file for file in dataset.files() or [] if is_image(file)]
        problems.raise_all("data", images)
        return opened

    @property
    def _many(self) -> bool:
        return len(self.items) > 1

    @cached_property
    def sources(self) -> Sequence[Source]:
        return self.described(list(map(len, self.datasets)))

    def described(self, counts: Sequence[int]) -> list[Source]:
        """`sources`, if their images are so many."""
        message = f"data has {len(self.items)} sources; expected {len(counts)}"
        require(len(counts) == len(self.items), message)
        return [
            Source(name, count, item.repeats, item.weight, item.mirror, item.path)
            for name, count, item in zip(self._names, counts, self.items)
        ]

    @property
    def has_masks(self) -> bool:
        return any(dataset.has_masks for dataset in self.datasets)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(len, self.datasets)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        dataset, inner = self._locate(index)
        return dataset[inner]

    def __getitems__(self, indices: Sequence[int]) -> Iterator[Sample]:
        """The samples of many indices, each source's read together."""
        located = [self._locate(index) for index in indices]
        groups: dict[int, list[int]] = {}
        for dataset, inner in located:
            groups.setdefault(id(dataset), []).append(inner)
        by_id = {id(dataset): dataset for dataset, _ in located}
        readers = {key: iter(by_id[key].__getitems__(group)) for key, group in groups.items()}
        return (next(readers[id(dataset)]) for dataset, _ in located)

    def captions(self, index: int) -> list[str]:
        dataset, inner = self._locate(index)
        return dataset.captions(inner)

    def all_captions(self) -> Iterator[list[str]]:
        for dataset in self.datasets:
            yield from dataset.all_captions()

    def content(self, index: int) -> bytes | None:
        dataset, inner = self._locate(index)
        return dataset.content(inner) if self.items[self._number_of(index)].hold_out else None

    def encoded(self, index: int) -> tuple[bytes | str, str] | None:
        dataset, inner = self._locate(index)
        return dataset.encoded(inner)

    def encoded_mask(self, index: int) -> tuple[bytes | str, str] | None:
        dataset, inner = self._locate(index)
        return dataset.encoded_mask(inner)

    def name(self, index: int) -> str:
        dataset, inner = self._locate(index)
        return dataset.name(inner)

    def size(self, index: int) -> Size | None:
        dataset, inner = self._locate(index)
        return dataset.size(inner)

    def files(self) -> list[Path] | None:
        found = [dataset.files() for dataset in self.datasets]
        return None if None in found else [file for files in found for file in files or []]

    def missing_images(self) -> list[MissingImages]:
        return [missing for dataset in self.datasets for missing in dataset.missing_images()]

    def _check_apart(self) -> None:
        """Refuse a folder to generate into that another source would read, too."""
        for item in (item for item in self.items if item.generate is not None):
            for other in (other for other in self.items if other is not item):
                apart = not (is_inside(item.path, other.path) or is_inside(other.path, item.path))
                got = f"the sources got '{item.path}' to generate into and '{other.path}', one inside the other"
                require(apart, f"{got}; expected separate folders, since each is read with its subfolders")

    def _number_of(self, index: int) -> int:
        return bisect_right(self._ends, index)

    def _locate(self, index: int) -> tuple[ImageDataset, int]:
        number = self._number_of(index)
        return self.datasets[number], index - (self._ends[number - 1] if number else 0)


@final
class GeneratedImages(ImageDataset):
    """The first `count` images of a folder, all with one caption; the run generates those that it lacks.

    The folder is listed when an image is read, so the run can generate them before.
    """

    def __init__(self, path: str, options: Mapping[str, Any], count: int, generation: Mapping[str, Any]) -> None:
        self.path, self.count, self.options, self.generation = path, count, dict(options), dict(generation)
        self.caption = options.get("prefix", "") + options["caption"]

    @cached_property
    def _images(self) -> ImageTextDataset:
        (missing,) = self.missing_images()
        lack = f"{self.path} lacks {len(missing.numbers)} of {self.count} class images"
        if missing.numbers:
            raise UnreadableImage(f"{lack}; use a model that generates them, add them, or use fewer")
        return ImageTextDataset(str(missing.folder), **{**self.options, "max_samples": self.count})

    def missing_images(self) -> list[MissingImages]:
        """Numbered by the first free numbers."""
        folder = expanded(self.path)
        message = f"'{folder}' is not a folder; expected a folder of images, to generate into"
        require(folder.is_dir() or not folder.exists(), message)
        files = list_files(folder) if folder.is_dir() else []
        missing = self.count - sum(map(is_image, files))
        taken = {file.name for file in files if file.parent == folder}
        free = (number for number in range(10**6) if f"{number:06}.png" not in taken)
        numbers = [number for number, _ in zip(free, range(missing))]
        return [MissingImages(folder, self.caption, numbers, dict(self.generation))]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return self._images[index]

    def __getitems__(self, indices: Sequence[int]) -> Iterator[Sample]:
        return self._images.__getitems__(indices)

    def captions(self, index: int) -> list[str]:
        return [self.caption]

    def content(self, index: int) -> None:
        """Nothing: they are all trained."""

    def encoded(self, index: int) -> tuple[bytes | str, str] | None:
        return None if self._lacking else self._images.encoded(index)

    def name(self, index: int) -> str:
        return f"image {index} of {self.path}" if self._lacking else self._images.name(index)

    def size(self, index: int) -> Size | None:
        return None if self._lacking else self._images.size(index)

    @property
    def _lacking(self) -> bool:
        """Whether some are still to be generated."""
        return "_images" not in self.__dict__ and bool(self.missing_images()[0].numbers)

    def files(self) -> list[Path]:
        return self._images.files()


def SubjectDataset(
    data: str, instance_prompt: str, *, class_data: str | None = None, class_prompt: str | None = None,
    num_class_images: int = 100, class_drawing: dict | None = None, prior_loss_weight: float = 1.0,
    image_column: str | None = None, allow_outside: bool = False,
) -> Sources:  # fmt: skip
    """Images of one subject, and of its class so that the class is not forgotten (DreamBooth).

    Prior preservation (arXiv 2208.12242) as two sources of equally many samples: half of them are of the class, with
    the weight `prior_loss_weight` in the loss. None of the images is held out.

    Args:
        data: the subject's images, anything that ImageTextDataset reads; its captions are ignored.
        instance_prompt, class_prompt: "a photo of sks dog", "a photo of a dog".
        class_data: a folder of class images, or None to train on the subject alone.
        num_class_images, class_drawing: `generate` and `generation` of the class, see `Item`.
        prior_loss_weight: above 0.
        image_column, allow_outside: as of ImageTextDataset, for `data`.
    """
    got = f"SubjectDataset got class_data={class_data!r} and class_prompt={class_prompt!r}"
    both_or_none = (class_data is None) == (class_prompt is None)
    require(both_or_none, f"{got}; expected both, or neither to train without class images")
    message = f"num_class_images got {num_class_images}; expected at least 1, or class_data=None for none"
    require(num_class_images >= 1, message)
    message = f"prior_loss_weight got {prior_loss_weight}; expected a number above 0, or class_data=None for none"
    require(prior_loss_weight > 0, message)
    generated = {"generate": num_class_images, "generation": class_drawing, "weight": prior_loss_weight}
    subject: dict[str, Any] = {"name": "subject", "path": data, "caption": instance_prompt, "hold_out": False}
    subject |= {"image_column": image_column, "allow_outside": allow_outside}
    of_class = {"name": "class", "path": class_data, "caption": class_prompt, **generated}
    items = [subject] if class_data is None else [subject, of_class]
    return Sources([{**item, "repeats": "balance"} for item in items])


def open_dataset(section: Any) -> ImageDataset:
    """The data set of a section of a config, or any object that is one; of a `path` that is a list, all its sources."""
    if not (isinstance(section, Mapping) and isinstance(section.get("path"), list)):
        return as_dataset(build(section))
    cls = resolve(section["type"])
    if not (isinstance(cls, type) and issubclass(cls, ImageTextDataset)):
        return as_dataset(build(section))
    return Sources(section["path"], {key: value for key, value in section.items() if key not in ("type", "path")}, cls)


def paths_of(section: Mapping[str, Any]) -> list[str]:
    """The paths and hub names in a data set's section."""
    found = []
    for name in LOCATION:
        for item in section[name] if isinstance(section.get(name), list) else [section.get(name)]:
            path = item.get("path") if isinstance(item, Mapping) else item
            found += [path] if isinstance(path, str) else []
    return found


def without(section: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    """A data set's section without some options; of a list of sources, without each item's."""
    kept = {key: value for key, value in section.items() if key not in names}
    if isinstance(items := section.get("path"), list):
        sections = [item if isinstance(item, Mapping) else {"path": item} for item in items]
        kept["path"] = [without(item, names) for item in sections]
    return kept


def samples_of(sources: Sequence[Source]) -> list[int]:
    """How many samples of each source an epoch takes, if nothing is held out."""
    fixed = [source.images * (1 if source.repeats == "balance" else source.repeats) for source in sources]
    most = max(fixed)
    return [most if source.repeats == "balance" else count for source, count in zip(sources, fixed)]


def epoch_of(sources: Sequence[Source], trained: Sequence[int] | None) -> tuple[Sequence[int], np.ndarray | None]:
    """What an epoch takes: the indices of images, and how often each was taken before it (None: never).

    Args:
        trained: the images that are not held out; None for all.
    """
    total, samples = sum(source.images for source in sources), samples_of(sources)
    if all(count == source.images for source, count in zip(sources, samples)):
        return range(total) if trained is None else trained, None
    message = f"the sources' repeats give an epoch of {sum(samples):,} samples; expected at most {LONGEST_EPOCH:,}"
    require(sum(samples) <= LONGEST_EPOCH, message)
    numbers = np.concatenate([np.arange(count) for count in samples])  # within the source
    images = np.repeat([source.images for source in sources], samples)
    starts = np.repeat(np.cumsum([0, *(source.images for source in sources)])[:-1], samples)
    order = np.lexsort((starts, numbers))  # the sources in turn
    indices, taken = (starts + numbers % images)[order], (numbers // images)[order]
    if trained is not None:
        kept = np.isin(indices, np.array(trained))
        indices, taken = indices[kept], taken[kept]
    return indices, taken


def _read(
    item: Any, label: str, shared: Mapping[str, Any], cls: Callable[..., ImageDataset], problems: list[str]
) -> Item:
    """One item of a list of sources; what is wrong with it is appended to `problems`."""
    given = {"path": item} if isinstance(item, str) else item
    if not (isinstance(given, Mapping) and isinstance(given.get("path"), str)):
        problems.append(f'{label} got {shown(item)}; expected a path, or dict(path="FOLDER", repeats=2)')
        return Item(path="")
    own: dict[str, Any] = {key: value for key, value in given.items() if key in OWN}
    options = {**shared, **{key: value for key, value in given.items() if key not in OWN}}
    known = [*OWN, *(name for name in signature(cls).parameters if name != "path")]
    hints = {key: did_you_mean(key, known) or f"; it takes {', '.join(known)}" for key in given if key not in known}
    wrong = [f"{label} has no option '{key}'{hint}" for key, hint in hints.items()]
    wrong = wrong or problems_against(Item, own, label, {"options"})
    wrong = wrong or problems_against(cls, {"path": own["path"], **options}, label, set())
    read = Item(path=own["path"]) if wrong else Item(**own, options=options)
    problems += wrong or [f"{label} got {problem}" for problem in _problems_of(read)]
    return read


def _problems_of(item: Item) -> list[str]:
    """Which values of an item are out of range."""
    repeats, weight, mirror, generate, name = item.repeats, item.weight, item.mirror, item.generate, item.name
    has_prompt = isinstance(item.options.get("caption"), str)
    checks = {
        f"repeats={repeats}; expected 1 to {MOST_REPEATS:,}, or 'balance'": repeats == "balance"
        or 1 <= repeats <= MOST_REPEATS,
        f"weight={weight}; expected a finite number above 0": 0 < weight < math.inf,
        f"mirror={mirror}; expected a probability from 0 to 1": mirror is None or 0 <= mirror <= 1,
        f"generate={generate}; expected at least 1": generate is None or generate >= 1,
        f"generate={generate} without a caption; set caption, which is the prompt": generate is None or has_prompt,
        f"name={shown(name)}; expected a text": name is None or name.strip() != "",
    }
    return [message for message, fine in checks.items() if not fine]


def _name_of(path: str) -> str:
    """The last component of a path or hub name."""
    return Path(path).name or Path(path).absolute().name or path


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number after those that were there before."""
    found: list[str] = []
    for name in names:
        number, unique = 2, name
        while unique in found:
            unique, number = f"{name}-{number}", number + 1
        found.append(unique)
    return found
