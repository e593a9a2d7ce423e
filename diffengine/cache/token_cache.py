"""The token cache of a run: whether it pays, built by all ranks, checked at each start, attached to the stream."""

import errno
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import KW_ONLY, astuple, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch

from diffengine import distributed
from diffengine.cache.checked import NONE_YET, digest_of
from diffengine.cache.fingerprint import difference, digest_of_images, digest_of_texts
from diffengine.cache.samples import DIMENSIONS, SHAPE, CachedDataset, columns_of
from diffengine.cache.tables import Rows, Table, TableBuilder, delete_table
from diffengine.datasets import ByShape, ImageDataset, Sample, Sources, Stream, same_shape, variation_batches
from diffengine.datasets.sources import LOCATION, USE, without
from diffengine.errors import UserError, disk_errors, require
from diffengine.files import expanded, locked
from diffengine.models.base import Encoder
from diffengine.terminal import Progress, say
from diffengine.text import format_bytes

Choice = bool | Literal["auto"]
NUM_SPOT_CHECKS = 8  # images encoded again at each start
MAX_MISMATCH = 0.01  # share of their tokens that may differ, since another device rounds and breaks ties differently
MAX_EMBEDDINGS = 4e9  # bytes on disk that text_embeddings="auto" may take
CAPTION_BATCH = 32
LOCK = ".lock"  # the first file in a cache's folder
NOTES = "files.json"  # digests of the images' files


def image_table(folder: Path) -> Table:
    """A cache's table of images."""
    return Table(folder / "pictures.arrow")


def caption_table(folder: Path) -> Table:
    """A cache's table of captions."""
    return Table(folder / "captions.arrow")


def cached_dataset(section: Mapping[str, Any], dataset: ImageDataset | None = None) -> CachedDataset | None:
    """The data set that the cache at a `token_cache` section's `path` holds, for a machine without the images.

    `dataset` has the sources, if the images are of several.
    """
    if section.get("path") is None or not section.get("use", "auto"):
        return None
    table = image_table(expanded(section["path"]))
    if table.fingerprint is not None:
        counts = table.fingerprint.get("sources")
        sources = dataset.described(counts) if counts and isinstance(dataset, Sources) else None
        return CachedDataset(table, table.fingerprint["forms"], sources)
    require(table.why_none == NONE_YET, f"{table.why_none}, and the images to build the cache again are not here")
    return None


@final
@dataclass(eq=False)
class TokenCache:
    """The `token_cache` section: what the frozen encoders make of images and captions, computed once.

    Training learns the same: on the same device, the token ids equal those computed at each step.

    Args:
        use: "auto" uses a cache if the run takes each variation of an image more than once (a variation: one draw of
            crop and flip; there are `image_variations` of them, or one if nothing varies). True builds it in any case,
            or says why it cannot be. False encodes at each step.
        path: its folder. None: `cache/` next to the work dir, in a subfolder named by a digest of what is encoded. A
            cache that was built elsewhere is used without the images.
        text_embeddings: store the frozen text encoder's outputs in fp32, not the captions' ids; "auto" up to 4 GB.
        stream, encoder, data, work_dir, precision, autocast: given by the run: its samples, the model's encoder, the
            resolved `train_dataloader` section, the work dir, and the precision and the autocast of the text encoder.

    Attributes:
        seconds: spent on encoding, by "images" and "captions"; empty if nothing was encoded.
    """

    use: Choice = "auto"
    path: str | None = None
    text_embeddings: Choice = "auto"
    _: KW_ONLY
    stream: Stream
    encoder: Encoder | None
    data: Mapping[str, Any]
    work_dir: Path
    precision: Callable[[], str]
    autocast: Callable[[], AbstractContextManager]

    def __post_init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._without_images = isinstance(self.stream.dataset, CachedDataset)

    def why_unusable(self, positions: int) -> str | None:
        """Return why a run of `positions` samples cannot use a cache, or None.

        Raises:
            UserError: the config asks for a cache that cannot be used.
        """
        reason = self._why_unusable(positions)
        asked = self.use is True or self._without_images
        require(reason is None or not asked, f"the cache cannot be used: {reason}")
        return reason

    def _why_unusable(self, positions: int) -> str | None:
        if not self.use:
            return "as configured"
        if self.encoder is None:
            return "this model learns from pixels; set --cfg-options cache=False"
        if self.stream.variations is None:
            return "crop and flip are drawn again each time; set image_variations to how many to keep of an image"
        if self._without_images:
            return None
        if self.use == "auto" and positions <= len(self.stream.dataset) * self.stream.variations:
            return "the run takes each variation at most once; set --cfg-options cache=True to build it all the same"
        (sample,) = self.stream.read_variations([0])
        for key, value in (sample or {}).items():
            if key not in ("image", "text") and not isinstance(value, torch.Tensor | bool | int | float):
                entry = f"{key} ({type(value).__name__})"
                return f"it takes tensors and numbers, not {entry}; drop it, or set --cfg-options cache=False"
        return None

    def attach_images(self, positions: int) -> bool:
        """Let the stream read from the cache, built first if need be. All ranks call it.

        Returns:
            Whether a run that takes so many samples in all has a cache; if so, call `attach_captions`.

        Raises:
            UserError: the cache is asked for and cannot be used, or cannot be built.
        """
        if reason := self.why_unusable(positions):
            if self.use and self.encoder is not None:
                distributed.print_once(f"token cache: none, since {reason}")
            return False
        folder = self.folder  # computed on all ranks
        distributed.on_rank_0(self._check_folder)
        with disk_errors(), _locked_on_rank_0(folder):
            images = image_table(folder) if self._without_images else self._build_images()
        self.stream.cached_sample = CachedDataset(images, self.variations).sample
        self._images, self._times = images, positions / len(images)
        return True

    def attach_captions(self) -> None:
        """Let the model read from the cache; after `attach_images`, and once the precision is chosen."""
        with disk_errors(), _locked_on_rank_0(self.folder):
            captions = self._build_captions()
        self._encoder.to_host()
        self._encoder.use_captions(_lookup(captions))
        size = format_bytes(self._images.nbytes + captions.nbytes)
        each = f"{self._describe_images()}, each taken {self._times:.3g} times"
        distributed.print_once(f"token cache: {each}; {size} in {self.folder}")

    def _describe_images(self) -> str:
        variations = "one variation" if self.variations == 1 else f"{self.variations} variations each"
        return f"{len(self.stream.dataset)} images in {variations}"

    @property
    def _encoder(self) -> Encoder:
        assert self.encoder is not None
        return self.encoder

    @property
    def variations(self) -> int:
        """Of each image."""
        assert self.stream.variations is not None
        return self.stream.variations

    @cached_property
    def folder(self) -> Path:
        """The folder, which need not exist yet. The same on all ranks."""
        key = self._key  # also for a path: all ranks need it
        default = digest_of([without(self.data["dataset"], USE), key])[:12]
        return self.work_dir.parent / "cache" / default if self.path is None else expanded(self.path)

    @cached_property
    def _key(self) -> dict[str, Any]:
        """The fingerprint of the table of images, apart from the images and captions themselves."""
        counts = [source.images for source in self.stream.sources]
        shapes = [astuple(item.shapes) for item in self.stream.image_transforms if isinstance(item, ByShape)]
        by_shape = {"shapes": shapes[0]} if shapes else {}
        return distributed.on_rank_0(
            lambda: {  # the names are those of version 0.1.0: the default folder's name depends on them
                "data set": without(self.data["dataset"], (*LOCATION, *USE)),
                **({"sources": counts} if len(counts) > 1 else {}),
                "image transforms": self.data["image_transforms"],
                "image_variations": self.stream.image_variations,
                "forms": self.variations,
                "seed": self.stream.seed if self.variations > 1 else None,
                **self._encoder.image_key(),
                **by_shape,
            }
        )

    def exists(self) -> bool:
        """Whether the cache is complete, as far as is known without reading the images."""
        table = image_table(self.folder)
        images = (table.fingerprint or {}).get("pictures")
        captions = digest_of_texts(self.stream.dataset.all_captions())
        change = table.change({"pictures": images, "captions": captions, **self._key})
        return change is None and caption_table(self.folder).damage() is None

    def _check_folder(self) -> None:
        """Refuse a folder that cannot be made, that holds files of other origin, or that does not fit the run."""
        for path in (self.folder, *self.folder.parents):
            message = f"the cache cannot be in '{self.folder}': '{path}' is not a folder; set cache_path"
            require(path.is_dir() or not path.exists(), message)
        tables = [image_table(self.folder), caption_table(self.folder)]
        if self._without_images:
            known = tables[0].fingerprint or {}
            same = {name: known.get(name) for name in ("pictures", "captions")}  # of what is not on this machine
            reason = difference(known, {**same, **self._key}) or tables[0].damage()
            message = f"the cache '{self.folder}' does not fit this run, and the images to build it again are not here"
            require(reason is None, f"{message}: {reason}")
        if (self.folder / LOCK).exists() or any(table.is_a_cache for table in tables):
            return
        own = [table.file.with_suffix(suffix) for suffix in (".arrow", ".json") for table in tables]
        there = ", ".join(file.name for file in [*own, self.folder / NOTES] if file.exists())
        message = f"the cache would overwrite {there} in '{self.folder}', which no cache has written"
        require(not there, f"{message}; set cache_path to a folder that is new or empty")

    def _build_images(self) -> Table:
        """The table of the images, built again if anything changed, or if a few of them now encode differently."""
        table, dataset, size = image_table(self.folder), self.stream.dataset, self._encoder.batch_size

        def find_change() -> tuple[dict[str, Any], str | None]:
            images, captions = digest_of_images(dataset, self.folder / NOTES), digest_of_texts(dataset.all_captions())
            fingerprint = {"pictures": images, "captions": captions, **self._key}
            change = table.change(fingerprint)
            if change is None and (change := self._check_images(table)):
                delete_table(table.file)  # no chunk of it can be kept
            return fingerprint, change

        fingerprint, reason = distributed.on_rank_0(find_change)
        builder = TableBuilder(table.file, fingerprint, len(dataset) * self.variations)
        if reason is None:
            distributed.on_rank_0(builder.sweep)
            return table
        missing = distributed.on_rank_0(lambda: _missing(builder, reason, self._describe_images(), "image variations"))
        with distributed.all_ranks():
            template = self._largest_readable()
        distributed.on_rank_0(lambda: _check_space(builder, missing, template))

        def write(chunks: list[Rows]) -> None:
            batches = [list(range(row, min(row + size, chunk[1]))) for chunk in chunks for row in range(*chunk, size)]
            read = variation_batches(self.stream, batches, self.data.get("num_workers", 0))
            encoded = (self._encode(batch) for batch in read)
            with Progress(sum(map(len, batches)), "encoded", "image variations") as progress:
                for first, end in chunks:
                    samples: list[Sample | None] = []
                    while len(samples) < end - first:
                        batch = next(encoded)
                        samples += batch
                        if distributed.rank() == 0:
                            progress.advance(len(batch))
                    builder.write((first, end), self._columns(range(first, end), samples, template))

        return self._build(builder, missing, write, "images")

    def _encode(self, samples: list[Sample | None]) -> list[Sample | None]:
        """The samples with the encoder's outputs instead of their images."""
        encoded: list[Sample | None] = [None] * len(samples)
        readable = [(number, sample) for number, sample in enumerate(samples) if sample is not None]
        for group in same_shape([sample["image"].shape for _, sample in readable]):
            columns = self._encoder.encode_images(torch.stack([readable[index][1]["image"] for index in group]))
            for row, (number, sample) in enumerate(readable[index] for index in group):
                others = {key: value for key, value in sample.items() if key != "image"}
                encoded[number] = {**others, **{name: column[row] for name, column in columns.items()}}
        return encoded

    def _columns(
        self, rows: Sequence[int], samples: Sequence[Sample | None], largest: Sample
    ) -> dict[str, np.ndarray | list[list[str]]]:
        """Encoded samples as the table's columns; `largest` shows what a row holds, and how much at most."""
        shapes = self.stream.shapes
        if shapes is None:
            return columns_of(samples, largest)
        arrays = {name: np.asarray(value) for name, value in largest.items() if isinstance(value, torch.Tensor)}
        flat = {name: value.size for name, value in arrays.items() if value.ndim > 1}
        own = np.array([shapes[row // self.variations] for row in rows], dtype=np.int32)
        return {**columns_of(samples, largest, flat), SHAPE: own}

    def _largest_readable(self) -> Sample:
        """An encoded sample of the largest shape: it shows what a row holds."""
        shapes = self.stream.shapes
        areas = [0] * len(self.stream.dataset) if shapes is None else list(map(math.prod, shapes))
        for index in sorted(range(len(areas)), key=lambda index: -areas[index]):
            (sample,) = self._encode(self.stream.read_variations([index * self.variations]))
            if sample is not None:
                return sample
        raise UserError(f"none of the {len(self.stream.dataset)} images can be read")

    def _check_images(self, table: Table) -> str | None:
        """Encode a few images again; what differs from the table by more than rounding."""
        rows = np.unique(np.linspace(0, len(table) - 1, NUM_SPOT_CHECKS).round().astype(int)).tolist()
        size = self._encoder.batch_size
        batches = [self.stream.read_variations(rows[start : start + size]) for start in range(0, len(rows), size)]
        encoded = [self._encode(batch) for batch in batches]
        same = total = 0
        for row, raw, sample in zip(rows, chain(*batches), chain(*encoded)):
            if raw is None or sample is None:
                continue
            stored = table[row]
            flat = {name: len(value) for name, value in stored.items() if name + DIMENSIONS in stored}
            columns = columns_of([sample], sample, flat)
            stored.pop(SHAPE, None)
            if columns.keys() != stored.keys():
                return f"samples have other entries than before: {', '.join(sorted(columns.keys() ^ stored.keys()))}"
            for name, value in columns.items():
                if isinstance(value, np.ndarray) and name in sample.keys() - raw.keys():  # the encoder's output
                    same += int((np.asarray(stored[name]) == value[0]).sum())
                    total += value[0].size
                elif not np.array_equal(stored[name], value[0], equal_nan=name == "weight"):
                    return f"{name} of image {row // self.variations} has changed"
        return None if same >= (1 - MAX_MISMATCH) * total else f"{total - same} of {total} tokens have changed"

    def _build_captions(self) -> Table:
        """The table of all distinct captions, built again if anything changed."""
        table, encoder = caption_table(self.folder), self._encoder

        def find_change() -> tuple[dict[str, Any], bool, str | None]:
            captions = distinct_captions(self.stream.dataset, self.stream)
            embeddings = self._stores_embeddings(len(captions))
            digest = digest_of_texts([caption] for caption in captions)
            precision = {"precision": self.precision()} if embeddings else {}
            fingerprint = {"captions": digest, **encoder.caption_key(embeddings), **precision}
            return fingerprint, embeddings, table.change(fingerprint)

        fingerprint, embeddings, reason = distributed.on_rank_0(find_change)
        if reason is None:
            return table
        captions = distinct_captions(self.stream.dataset, self.stream)
        builder = TableBuilder(table.file, fingerprint, len(captions))
        missing = distributed.on_rank_0(lambda: _missing(builder, reason, f"{len(captions)} captions", "captions"))

        def write(chunks: list[Rows]) -> None:
            for rows in chunks:
                texts = captions[slice(*rows)]
                batches = [texts[start : start + CAPTION_BATCH] for start in range(0, len(texts), CAPTION_BATCH)]
                with self.autocast():
                    encoded = [encoder.encode_captions(batch, embeddings) for batch in batches]
                columns = {name: np.concatenate([batch[name].numpy() for batch in encoded]) for name in encoded[0]}
                builder.write(rows, {**columns, "text": [[text] for text in texts]})

        return self._build(builder, missing, write, "captions")

    def _stores_embeddings(self, captions: int) -> bool:
        """Whether the table of so many captions holds their embeddings; a line says why "auto" does not store them.

        Raises:
            UserError: the config asks for embeddings that cannot be stored.
        """
        choice, caption_bytes = self.text_embeddings, self._encoder.embedding_bytes
        if caption_bytes is None:
            require(choice is not True, "text_embeddings=True, but the text encoder is trained and changes; unset it")
            return False
        reason = None
        if self.stream.caption_variations is None:
            reason = "tags are drawn again each time; set caption_variations to how many to keep of a caption"
            require(choice is not True, f"text_embeddings=True, but {reason}")
        elif choice == "auto" and captions * caption_bytes > MAX_EMBEDDINGS:
            size = format_bytes(captions * caption_bytes)
            reason = f"its outputs for {captions:,} captions take {size}; set --cfg-options text_embeddings=True"
        if choice == "auto" and reason:
            say(f"token cache: the text encoder runs at each step, since {reason}")
        return choice is True or (choice == "auto" and reason is None)

    def _build(
        self, builder: TableBuilder, missing: list[Rows], write: Callable[[list[Rows]], None], what: str
    ) -> Table:
        """The table, its missing chunks written by all ranks, each its share."""
        distributed.on_rank_0(builder.begin)
        began = time.perf_counter()
        with distributed.all_ranks():
            write(missing[distributed.rank() :: distributed.world_size()])
        self.seconds[what] = time.perf_counter() - began
        distributed.on_rank_0(builder.finish)
        return Table(builder.file)


def distinct_captions(dataset: ImageDataset, stream: Stream) -> list[str]:
    """The captions of the data with the stream's variations of them, and "", which a dropped caption becomes."""
    captions = dict.fromkeys(["", *chain.from_iterable(dataset.all_captions())])
    return list(dict.fromkeys(chain(captions, *map(stream.variations_of, captions))))


def _missing(builder: TableBuilder, reason: str, everything: str, rows: str) -> list[Rows]:
    """The chunks that have to be encoded, after a line that says why and how many rows they have."""
    missing = builder.missing()
    count, total = (sum(end - first for first, end in chunks) for chunks in (missing, builder.chunks))
    encoded = everything if count == total else f"{count:,} of {total:,} {rows}"
    say(f"token cache: {reason}; encoding {encoded}")
    return missing


def _check_space(builder: TableBuilder, missing: list[Rows], template: Sample) -> None:
    """Refuse a disk without room for the table and those of its chunks that are missing."""
    arrays = [value for value in columns_of([template], template).values() if isinstance(value, np.ndarray)]
    rows = builder.chunks[-1][1] + sum(end - first for first, end in missing)
    need, folder = rows * sum(array.nbytes for array in arrays), builder.file.parent
    free = shutil.disk_usage(folder).free
    if builder.kept is None and builder.file.is_file():
        free += builder.file.stat().st_size  # it is deleted before the build
    message = f"the cache needs {format_bytes(need)} while it is built and '{folder}' has {format_bytes(free)} free"
    require(need <= free, f"{message}; free space, set cache_path to another disk, or --cfg-options cache=False")


def _lookup(table: Table) -> Callable[[str], dict[str, np.ndarray] | None]:
    """A function from a caption to its row of the table, None for an unknown caption."""
    rows = {text: row for row, (text,) in enumerate(table.texts())}

    def look_up(caption: str) -> dict[str, np.ndarray] | None:
        if caption not in rows:
            return None
        return {name: value for name, value in table[rows[caption]].items() if isinstance(value, np.ndarray)}

    return look_up


@contextmanager
def _locked_on_rank_0(folder: Path) -> Iterator[None]:
    """One run at a time checks and builds a cache; others wait."""
    file, held = folder / LOCK, ExitStack()

    def lock() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file.touch()
            held.enter_context(locked(file))
        except BlockingIOError:
            distributed.print_once(f"token cache: another run builds '{folder}'; waiting for it")
            held.enter_context(locked(file, wait=True))
        except OSError as error:  # nobody can build in a read-only folder, and a complete cache there can be read
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise

    with held:
        distributed.on_rank_0(lock)
        yield
