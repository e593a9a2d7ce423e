"""The token cache of a run: whether it pays, built by all ranks, checked at each start, attached to the stream."""

import errno
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, final

import numpy as np

from diffengine import distributed
from diffengine.cache.fingerprint import difference, digest_of, digest_of_images, digest_of_texts
from diffengine.cache.samples import CachedDataset, columns_of, unstorable
from diffengine.cache.tables import Rows, Table, TableBuilder
from diffengine.datasets import Sample, Stream, collate, variation_batches
from diffengine.distributed import print_once
from diffengine.errors import UserError
from diffengine.files import locked
from diffengine.models.base import Encoder
from diffengine.text import format_bytes, format_duration

T = TypeVar("T")
Choice = bool | Literal["auto"]
CHECKED = 8  # images encoded again at each start
TOLERATED = 0.01  # of their tokens may differ: another device rounds differently, and a tie may fall the other way
MAX_EMBEDDINGS = 4e9  # bytes on disk that text_embeddings="auto" may take
CAPTION_BATCH = 32
PATHS = ("path", "data", "class_data")  # options of a data set that say where it is, not what it returns
LOCK = ".lock"  # the first file in a cache's folder
NOTES = "files.json"  # digests of the images' files


def image_table(folder: Path) -> Table:
    """A cache's table of images."""
    return Table(folder / "pictures.arrow")


def caption_table(folder: Path) -> Table:
    """A cache's table of captions."""
    return Table(folder / "captions.arrow")


def cached_dataset(section: Mapping[str, Any]) -> CachedDataset | None:
    """The data set that the cache at a `token_cache` section's `path` holds, for a machine without the images."""
    if section.get("path") is None or not section.get("use", "auto"):
        return None
    table = image_table(Path(section["path"]).expanduser())
    return None if table.fingerprint is None else CachedDataset(table, table.fingerprint["forms"])


@final
class TokenCache:
    """The `token_cache` section: what the frozen encoders make of images and captions, computed once.

    Training learns the same: ids equal those computed at each step, id for id, on the same device.

    Args:
        use: "auto" uses a cache if the run takes each variation of an image more than once (a variation: one draw of
            crop and flip; there are `image_variations` of them, or one if nothing varies). True builds it in any case,
            or says why it cannot be. False encodes at each step.
        path: its folder. None: `cache/` next to the work dir, in a subfolder named by a digest of what is encoded. A
            cache that was built elsewhere is used without the images.
        text_embeddings: also store the frozen text encoder's outputs, in fp32; "auto" up to 4 GB of them.
        stream, encoder, data, work_dir, precision, autocast: given by the run: its samples, the model's encoder, the
            resolved `train_dataloader` section, the work dir, and the autocast around the text encoder.

    Attributes:
        seconds: spent on encoding, by "images" and "captions"; empty if nothing was encoded.
    """

    def __init__(
        self,
        use: Choice = "auto",
        path: str | None = None,
        text_embeddings: Choice = "auto",
        *,
        stream: Stream,
        encoder: Encoder | None,
        data: Mapping[str, Any],
        work_dir: Path,
        precision: str,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        self.use = use
        self.text_embeddings = text_embeddings
        self.stream = stream
        self.seconds: dict[str, float] = {}
        self._path = None if path is None else Path(path).expanduser()
        self._encoder = encoder
        self._data = data
        self._work_dir = work_dir
        self._precision = precision
        self._autocast = autocast
        self._without_images = isinstance(stream.dataset, CachedDataset)

    def obstacle(self, positions: int) -> str | None:
        """Why the run has no cache; None if it has one.

        Args:
            positions: the samples that the whole run takes.

        Raises:
            UserError: the cache is asked for, and there is an obstacle.
        """
        reason = self._obstacle(positions)
        if reason and (self.use is True or self._without_images):
            raise UserError(f"the cache cannot be used: {reason}")
        return reason

    def _obstacle(self, positions: int) -> str | None:
        if not self.use:
            return "as configured"
        if self._encoder is None:
            return "this model learns from pixels; set cache=False"
        if self.stream.variations is None:
            return "crop and flip are drawn again each time; set image_variations to how many to keep of an image"
        if self._without_images:
            return None
        if self.use == "auto" and positions <= len(self.stream.dataset) * self.stream.variations:
            return "the run takes each variation at most once; set cache=True to build it all the same"
        (sample,) = self.stream.read_variations([0])
        if sample is not None and (entry := unstorable(sample)):
            return f"it stores tensors and numbers, but a sample has {entry}; leave that out, or set cache=False"
        return None

    def attach(self, positions: int) -> bool:
        """Let the stream and the model read from the cache, building it first if need be. Called on all ranks.

        Args:
            positions: the samples that the whole run takes.

        Returns:
            Whether the run has a cache.

        Raises:
            UserError: the cache is asked for and cannot be used, or cannot be built.
        """
        if reason := self.obstacle(positions):
            if self.use and self._encoder is not None:
                print_once(f"token cache: none, since {reason}")
            return False
        folder = self.folder  # computed on all ranks
        distributed.on_rank_0(self._check_folder)
        with _locked_on_rank_0(folder):
            images = image_table(self.folder) if self._without_images else self._build_images()
            captions = self._build_captions()
        self.encoder.to_host()
        self.stream.cached_sample = CachedDataset(images, self.variations).sample
        self.encoder.use_captions(_lookup(captions))
        print_once(
            f"token cache: {len(self.stream.dataset)} images in {describe_variations(self.variations)}, each taken "
            f"{positions / len(images):.3g} times; {format_bytes(images.nbytes + captions.nbytes)} in {folder}"
        )
        return True

    @property
    def encoder(self) -> Encoder:
        """The model's."""
        assert self._encoder is not None
        return self._encoder

    @property
    def variations(self) -> int:
        """Of each image."""
        assert self.stream.variations is not None
        return self.stream.variations

    @cached_property
    def folder(self) -> Path:
        """Where it is, or will be. The same on all ranks."""
        default = digest_of([self._data["dataset"], self._key])[:12]
        return self._path or self._work_dir.parent / "cache" / default

    @cached_property
    def _key(self) -> dict[str, Any]:
        """The fingerprint of the table of images, apart from the images and captions themselves."""
        dataset = {name: value for name, value in self._data["dataset"].items() if name not in PATHS}
        return distributed.on_rank_0(
            lambda: {  # the names are those of version 0.1.0: the default folder's name depends on them
                "data set": dataset,
                "image transforms": self._data["image_transforms"],
                "image_variations": self.stream.image_variations,
                "forms": self.variations,
                "seed": self.stream.seed if self.variations > 1 else None,
                **self.encoder.image_key(),
            }
        )

    def exists(self) -> bool:
        """Whether the cache is complete, as far as can be told without reading the images."""
        known = image_table(self.folder).fingerprint
        captions = digest_of_texts(self.stream.dataset.all_captions())
        complete = caption_table(self.folder).fingerprint is not None
        images = {"pictures": (known or {}).get("pictures"), "captions": captions, **self._key}
        return complete and difference(known, images) is None

    def _check_folder(self) -> None:
        """Refuse a folder that cannot be made, that holds files of other origin, or that does not fit the run."""
        blocking = [path for path in (self.folder, *self.folder.parents) if path.exists() and not path.is_dir()]
        if blocking:
            raise UserError(f"the cache cannot be in '{self.folder}': '{blocking[0]}' is not a folder; set cache_path")
        tables = [image_table(self.folder), caption_table(self.folder)]
        if self._without_images:
            known = tables[0].fingerprint or {}
            same = {name: known.get(name) for name in ("pictures", "captions")}  # of what is not on this machine
            if reason := difference(known, {**same, **self._key}):
                raise UserError(
                    f"the cache '{self.folder}' does not fit this run, and the images to build it again are not here: "
                    f"{reason}"
                )
        if (self.folder / LOCK).exists() or any(table.fingerprint is not None for table in tables):
            return
        files = [table.file for table in tables]
        own = [*files, *(file.with_suffix(".json") for file in files), self.folder / NOTES]
        if there := [file.name for file in own if file.exists()]:
            raise UserError(
                f"the cache would overwrite {', '.join(there)} in '{self.folder}', which no cache has written; set "
                "cache_path to a folder that is new or empty"
            )

    # ------------------------------------------------------------------------------------------------------ images

    def _build_images(self) -> Table:
        """The table of the images, built again if anything changed, or if a few of them now encode differently."""
        table, dataset, size = image_table(self.folder), self.stream.dataset, self.encoder.batch_size

        def find_change() -> tuple[dict[str, Any], str | None]:
            fingerprint = {
                "pictures": digest_of_images(dataset, self.folder / NOTES),
                "captions": digest_of_texts(dataset.all_captions()),
                **self._key,
            }
            return fingerprint, difference(table.fingerprint, fingerprint) or self._check_images(table)

        fingerprint, reason = distributed.on_rank_0(find_change)
        builder = TableBuilder(table.file, fingerprint, len(dataset) * self.variations)
        if reason is None:
            distributed.on_rank_0(builder.sweep)
            return table
        print_once(f"token cache: {reason}; encoding {len(dataset)} images in {describe_variations(self.variations)}")
        with distributed.all_ranks():
            template = self._first_readable()
        distributed.on_rank_0(lambda: _check_space(builder, template))

        def write(chunks: list[Rows]) -> None:
            batches = [
                list(range(start, min(start + size, end))) for first, end in chunks for start in range(first, end, size)
            ]
            read = variation_batches(self.stream, batches, self._data.get("num_workers", 0))
            encoded = progress((self._encode(batch) for batch in read), sum(map(len, batches)), "image variations")
            for first, end in chunks:
                samples: list[Sample | None] = []
                while len(samples) < end - first:
                    samples += next(encoded)
                builder.write((first, end), columns_of(samples, template))

        return self._build(builder, write, "images")

    def _encode(self, samples: list[Sample | None]) -> list[Sample | None]:
        """The samples with the encoder's outputs instead of their images."""
        images = [{"image": sample["image"]} for sample in samples if sample is not None]
        if not images:
            return samples
        columns = self.encoder.encode_images(collate(images)["image"])
        rows = ({name: column[index] for name, column in columns.items()} for index in range(len(images)))
        return [
            None
            if sample is None
            else {**{key: value for key, value in sample.items() if key != "image"}, **next(rows)}
            for sample in samples
        ]

    def _first_readable(self) -> Sample:
        """An encoded sample: it shows what a row holds."""
        count = len(self.stream.dataset)
        for index in range(count):
            (sample,) = self._encode(self.stream.read_variations([index * self.variations]))
            if sample is not None:
                return sample
        raise UserError(f"none of the {count} images can be read")

    def _check_images(self, table: Table) -> str | None:
        """Encode a few images again; what differs from the table by more than rounding."""
        rows = np.unique(np.linspace(0, len(table) - 1, CHECKED).round().astype(int)).tolist()
        size = self.encoder.batch_size
        raws = [
            raw
            for start in range(0, len(rows), size)
            for raw in self.stream.read_variations(rows[start : start + size])
        ]
        encoded = [sample for start in range(0, len(rows), size) for sample in self._encode(raws[start : start + size])]
        same = total = 0
        for row, raw, sample in zip(rows, raws, encoded):
            if raw is None or sample is None:
                continue
            stored, columns = table[row], columns_of([sample], sample)
            if columns.keys() != stored.keys():
                return f"samples have other entries than before: {', '.join(sorted(columns.keys() ^ stored.keys()))}"
            for name, value in columns.items():
                if isinstance(value, np.ndarray) and name in sample.keys() - raw.keys():  # the encoder's output
                    same += int((np.asarray(stored[name]) == value[0]).sum())
                    total += value[0].size
                elif not np.array_equal(stored[name], value[0], equal_nan=name == "weight"):
                    return f"{name} of image {row // self.variations} has changed"
        return None if same >= (1 - TOLERATED) * total else f"{total - same} of {total} tokens have changed"

    # ---------------------------------------------------------------------------------------------------- captions

    def _build_captions(self) -> Table:
        """The table of all distinct captions, built again if anything changed."""
        table, encoder = caption_table(self.folder), self.encoder

        def find_change() -> tuple[dict[str, Any], bool, str | None]:
            captions = distinct_captions(self.stream)
            embeddings = stores_embeddings(self.text_embeddings, len(captions), encoder.embedding_bytes)
            fingerprint = {
                "captions": digest_of_texts([caption] for caption in captions),
                **encoder.caption_key(embeddings),
                **({"precision": self._precision} if embeddings else {}),
            }
            return fingerprint, embeddings, difference(table.fingerprint, fingerprint)

        fingerprint, embeddings, reason = distributed.on_rank_0(find_change)
        if reason is None:
            return table
        captions = distinct_captions(self.stream)
        builder = TableBuilder(table.file, fingerprint, len(captions))

        def encode(rows: Rows) -> dict[str, np.ndarray]:
            columns: dict[str, list[np.ndarray]] = {}
            for start in range(*rows, CAPTION_BATCH):
                with self._autocast():
                    encoded = encoder.encode_captions(captions[start : min(start + CAPTION_BATCH, rows[1])], embeddings)
                for name, column in encoded.items():
                    columns.setdefault(name, []).append(column.numpy())
            return {name: np.concatenate(batches) for name, batches in columns.items()}

        def write(chunks: list[Rows]) -> None:
            for rows in chunks:
                builder.write(rows, {**encode(rows), "text": [[caption] for caption in captions[slice(*rows)]]})

        return self._build(builder, write, "captions")

    def _build(self, builder: TableBuilder, write: Callable[[list[Rows]], None], what: str) -> Table:
        """The table, its missing chunks written by all ranks, each its share."""
        distributed.on_rank_0(builder.begin)
        missing = distributed.on_rank_0(builder.missing)
        began = time.perf_counter()
        with distributed.all_ranks():
            write(missing[distributed.rank() :: distributed.world_size()])
        self.seconds[what] = time.perf_counter() - began
        distributed.on_rank_0(builder.finish)
        return Table(builder.file)


def describe_variations(variations: int) -> str:
    """ "one variation" or "8 variations each"."""
    return "one variation" if variations == 1 else f"{variations} variations each"


def distinct_captions(stream: Stream) -> list[str]:
    """The captions of the data, and "", which a dropped caption becomes."""
    return list(dict.fromkeys(["", *(text for texts in stream.dataset.all_captions() for text in texts)]))


def stores_embeddings(choice: Choice, captions: int, caption_bytes: int | None) -> bool:
    """Whether the table of captions holds their embeddings.

    Args:
        choice: `text_embeddings` of the config.
        captions: how many.
        caption_bytes: of one caption's embeddings; None if they change in training.

    Raises:
        UserError: True, but they change.
    """
    if choice is True and caption_bytes is None:
        raise UserError("text_embeddings=True, but the text encoder is trained, so its outputs change; leave it out")
    fits = caption_bytes is not None and captions * caption_bytes <= MAX_EMBEDDINGS
    return caption_bytes is not None and (choice is True or (choice == "auto" and fits))


def _check_space(builder: TableBuilder, template: Sample) -> None:
    """Refuse a disk without room for the table and those of its chunks that are missing."""
    arrays = [value for value in columns_of([template], template).values() if isinstance(value, np.ndarray)]
    rows = builder.chunks[-1][1] + sum(end - first for first, end in builder.missing())
    need = rows * sum(array.nbytes for array in arrays)
    free = shutil.disk_usage(builder.file.parent).free
    if builder.file.exists():
        free += Table(builder.file).nbytes  # it is deleted before the build
    if need > free:
        raise UserError(
            f"the cache needs {format_bytes(need)} while it is built and '{builder.file.parent}' has "
            f"{format_bytes(free)} free; free space, set cache_path to another disk, or cache=False"
        )


def _lookup(table: Table) -> Callable[[str], dict[str, np.ndarray] | None]:
    """A function from a caption to its row of the table, None for an unknown caption."""
    rows = {text: row for row, (text,) in enumerate(table.texts())}

    def look_up(caption: str) -> dict[str, np.ndarray] | None:
        row = rows.get(caption)
        if row is None:
            return None
        return {name: value for name, value in table[row].items() if isinstance(value, np.ndarray)}

    return look_up


@contextmanager
def _locked_on_rank_0(folder: Path) -> Iterator[None]:
    """One run at a time checks and builds a cache; others wait."""
    with ExitStack() as held:

        def lock() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                (folder / LOCK).touch()
            except OSError as error:
                if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                    return  # nobody can build in a read-only folder, and a complete cache there can be read
                raise
            try:
                held.enter_context(locked(folder / LOCK))
            except BlockingIOError:
                print_once(f"token cache: another run builds '{folder}'; waiting for it")
                held.enter_context(locked(folder / LOCK, wait=True))

        distributed.on_rank_0(lock)
        yield


def progress(batches: Iterable[list[T]], total: int, what: str, every: float = 10.0) -> Iterator[list[T]]:
    """Pass batches on, and print every few seconds how much is done, how fast, and how long to go."""
    done, began = 0, time.perf_counter()
    printed = began
    for batch in batches:
        done += len(batch)
        now = time.perf_counter()
        if now - printed >= every:
            printed, rate = now, done / (now - began)
            left = format_duration((total - done) / rate)
            print_once(f"encoded {done:,}/{total:,} {what}, {rate:.3g}/s, {left} left")
        yield batch
