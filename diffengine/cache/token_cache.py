"""The token cache of a run: whether it pays, built by all ranks, checked at each start, attached to the stream."""

import errno
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import numpy as np

from diffengine import distributed
from diffengine.cache.fingerprint import difference, digest_of, digest_of_images, digest_of_texts
from diffengine.cache.samples import CachedDataset, CachedSamples, columns_of, unstorable
from diffengine.cache.tables import Rows, Table, TableBuilder
from diffengine.datasets import Sample, Stream, collate, variation_loader
from diffengine.distributed import print_once
from diffengine.errors import UserError
from diffengine.files import locked
from diffengine.models.base import Encoder
from diffengine.text import format_bytes, format_duration

CHECKED = 8  # images encoded again at each start
TOLERATED = 0.01  # of their tokens may differ: another device rounds differently, and a tie may fall the other way
MAX_EMBEDDINGS = 4e9  # bytes on disk that text_embeddings="auto" may take
CAPTION_BATCH = 32
PATHS = ("path", "data", "class_data")  # options of a data set that say where it is, not what it returns
LOCK = ".lock"  # the first file in a cache's folder
NOTES = "files.json"  # digests of the images' files
Choice = bool | Literal["auto"]


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
    """

    def __init__(self, use: Choice = "auto", path: str | None = None, text_embeddings: Choice = "auto") -> None:
        self.use = use
        self.path = None if path is None else Path(path).expanduser()
        self.text_embeddings = text_embeddings

    def dataset(self) -> CachedDataset | None:
        """A data set of what the cache at `path` holds, for a machine without the images."""
        if self.path is None or not self.use:
            return None
        table = image_table(self.path)
        if table.fingerprint is None:
            return None
        return CachedDataset(CachedSamples(table, table.fingerprint["forms"]))


@dataclass
class Plan:
    """The cache that a run uses: where it is, and what fills it.

    Attributes:
        folder: where it is, or will be.
        key: the fingerprint of the table of images, apart from the images and captions themselves.
        stream: its images and captions.
        encoder: the model's.
        text_embeddings: as in the config.
        precision: of the autocast around the text encoder.
        autocast: enters it.
        num_workers: processes that read images.
        seconds: spent on encoding, by "images" and "captions".
    """

    folder: Path
    key: dict[str, Any]
    stream: Stream
    encoder: Encoder
    text_embeddings: Choice
    precision: str
    autocast: Callable[[], AbstractContextManager]
    num_workers: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def without_images(self) -> bool:
        """The images are not on this machine: the cache is all there is of them."""
        return isinstance(self.stream.dataset, CachedDataset)

    @property
    def variations(self) -> int:
        """Of each image."""
        assert self.stream.variations is not None
        return self.stream.variations


def image_table(folder: Path) -> Table:
    """A cache's table of images."""
    return Table(folder / "pictures.arrow")


def caption_table(folder: Path) -> Table:
    """A cache's table of captions."""
    return Table(folder / "captions.arrow")


def obstacle(cache: TokenCache, stream: Stream, encoder: Encoder | None, positions: int) -> str | None:
    """Why a run has no cache; None if it has one.

    Args:
        positions: the samples that the whole run takes.
    """
    if not cache.use:
        return "as configured"
    if encoder is None:
        return "this model learns from pixels; set cache=False"
    if stream.variations is None:
        return "crop and flip are drawn again each time; set image_variations to how many to keep of an image"
    if isinstance(stream.dataset, CachedDataset):
        return None
    if cache.use == "auto" and positions <= len(stream.dataset) * stream.variations:
        return "the run takes each variation at most once; set cache=True to build it all the same"
    (sample,) = stream.read_variations([0])
    if sample is not None and (entry := unstorable(sample)):
        return f"it stores tensors and numbers, but a sample has {entry}; leave that out, or set cache=False"
    return None


def make_plan(
    cache: TokenCache,
    stream: Stream,
    encoder: Encoder,
    data: Mapping[str, Any],
    work_dir: Path,
    precision: str,
    autocast: Callable[[], AbstractContextManager],
) -> Plan:
    """The cache of a run that has one.

    Args:
        data: the resolved `train_dataloader` section.
        work_dir: of the run; the default folder is next to it.
        precision, autocast: of the text encoder.

    Raises:
        UserError: the folder cannot be used; or the images are elsewhere and something else changed.
    """
    assert stream.variations is not None
    key = distributed.on_rank_0(
        lambda: {  # the names are those of version 0.1.0: the folder's name depends on them
            "data set": {name: value for name, value in data["dataset"].items() if name not in PATHS},
            "image transforms": data["image_transforms"],
            "image_variations": stream.image_variations,
            "forms": stream.variations,
            "seed": stream.seed if stream.variations > 1 else None,  # type: ignore[operator]
            **encoder.image_key(),
        }
    )
    folder = cache.path or work_dir.parent / "cache" / digest_of([data["dataset"], key])[:12]
    workers = data.get("num_workers", 0)
    plan = Plan(folder, key, stream, encoder, cache.text_embeddings, precision, autocast, workers)
    distributed.on_rank_0(lambda: _check_folder(folder))
    if plan.without_images:
        distributed.on_rank_0(lambda: _check_without_images(plan))
    return plan


def attach(
    cache: TokenCache,
    stream: Stream,
    encoder: Encoder | None,
    data: Mapping[str, Any],
    work_dir: Path,
    positions: int,
    precision: str,
    autocast: Callable[[], AbstractContextManager],
) -> Plan | None:
    """Let the stream and the model read from the cache, building it first if need be; arguments as of `make_plan`.

    Returns:
        What was attached; None if the run has no cache.

    Raises:
        UserError: the cache is asked for and cannot be used, or cannot be built.
    """
    reason = obstacle(cache, stream, encoder, positions)
    if reason and (cache.use is True or isinstance(stream.dataset, CachedDataset)):
        raise UserError(f"the cache cannot be used: {reason}")
    if reason or encoder is None:
        if cache.use and encoder is not None:
            print_once(f"token cache: none, since {reason}")
        return None
    plan = make_plan(cache, stream, encoder, data, work_dir, precision, autocast)
    with _locked(plan.folder):
        images = image_table(plan.folder) if plan.without_images else _build_images(plan)
        captions = _build_captions(plan)
    encoder.to_host()
    stream.cached_sample = CachedSamples(images, plan.variations)
    encoder.use_captions(_lookup(captions))
    print_once(
        f"token cache: {len(stream.dataset)} images in {describe_variations(plan.variations)}, each taken "
        f"{positions / len(images):.3g} times; {format_bytes(images.nbytes + captions.nbytes)} in {plan.folder}"
    )
    return plan


def describe_variations(variations: int) -> str:
    """ "one variation" or "8 variations each"."""
    return "one variation" if variations == 1 else f"{variations} variations each"


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be, or that holds files of other origin under the cache's own names."""
    blocking = [path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()]
    if blocking:
        raise UserError(f"the cache cannot be in '{folder}': '{blocking[0]}' is not a folder; set cache_path")
    tables = [image_table(folder), caption_table(folder)]
    if (folder / LOCK).exists() or any(table.fingerprint is not None for table in tables):
        return
    files = [table.file for table in tables]
    own = [*files, *(file.with_suffix(".json") for file in files), folder / NOTES]
    if there := [file.name for file in own if file.exists()]:
        raise UserError(
            f"the cache would overwrite {', '.join(there)} in '{folder}', which no cache has written; set cache_path "
            "to a folder that is new or empty"
        )


def _check_without_images(plan: Plan) -> None:
    known = image_table(plan.folder).fingerprint or {}
    same = {name: known.get(name) for name in ("pictures", "captions")}  # of what is not on this machine
    if reason := difference(known, {**same, **plan.key}):
        raise UserError(
            f"the cache '{plan.folder}' does not fit this run, and the images to build it again are not here: {reason}"
        )


# --------------------------------------------------------------------------------------------------------- images


def _build_images(plan: Plan) -> Table:
    """The table of the images, built again if anything changed, or if a few of them now encode differently."""
    table, stream, encoder = image_table(plan.folder), plan.stream, plan.encoder

    def find_change() -> tuple[dict[str, Any], str | None]:
        fingerprint = {
            "pictures": digest_of_images(stream.dataset, plan.folder / NOTES),
            "captions": digest_of_texts(stream.dataset.all_captions()),
            **plan.key,
        }
        return fingerprint, difference(table.fingerprint, fingerprint) or _check_images(table, plan)

    fingerprint, reason = distributed.on_rank_0(find_change)
    if reason is None:
        distributed.on_rank_0(TableBuilder(table.file, fingerprint, 0).sweep)
        return table
    count = len(stream.dataset)
    print_once(f"token cache: {reason}; encoding {count} images in {describe_variations(plan.variations)}")
    with distributed.all_ranks():
        template = _first_readable(plan)
    builder = TableBuilder(table.file, fingerprint, count * plan.variations)
    distributed.on_rank_0(lambda: _check_space(builder, template))

    def write(chunks: list[Rows]) -> None:
        size = encoder.batch_size
        batches = [
            list(range(start, min(start + size, end))) for first, end in chunks for start in range(first, end, size)
        ]
        loaded = iter(variation_loader(stream, batches, plan.num_workers))
        progress = Progress(sum(end - first for first, end in chunks), "image variations")
        for first, end in chunks:
            samples: list[Sample | None] = []
            while len(samples) < end - first:
                encoded = encode(next(loaded), encoder)
                samples += encoded
                progress.add(len(encoded))
            builder.write((first, end), columns_of(samples, template))

    return _build(builder, write, plan, "images")


def encode(samples: list[Sample | None], encoder: Encoder) -> list[Sample | None]:
    """The samples with the encoder's outputs instead of their images."""
    images = [{"image": sample["image"]} for sample in samples if sample is not None]
    if not images:
        return samples
    columns = encoder.encode_images(collate(images)["image"])
    rows = ({name: column[index] for name, column in columns.items()} for index in range(len(images)))
    return [
        None if sample is None else {**{key: value for key, value in sample.items() if key != "image"}, **next(rows)}
        for sample in samples
    ]


def _first_readable(plan: Plan) -> Sample:
    """An encoded sample: it shows what a row holds."""
    count = len(plan.stream.dataset)
    for index in range(count):
        (sample,) = encode(plan.stream.read_variations([index * plan.variations]), plan.encoder)
        if sample is not None:
            return sample
    raise UserError(f"none of the {count} images can be read")


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


def _check_images(table: Table, plan: Plan) -> str | None:
    """Encode a few images again; what differs from the table by more than rounding."""
    rows = np.unique(np.linspace(0, len(table) - 1, CHECKED).round().astype(int)).tolist()
    size = plan.encoder.batch_size
    batches = [plan.stream.read_variations(rows[start : start + size]) for start in range(0, len(rows), size)]
    pairs = [pair for batch in batches for pair in zip(batch, encode(batch, plan.encoder))]
    same = total = 0
    for row, (raw, encoded) in zip(rows, pairs):
        if raw is None or encoded is None:
            continue
        stored = table[row]
        columns = columns_of([encoded], encoded)
        if columns.keys() != stored.keys():
            return f"samples have other entries than before: {', '.join(sorted(columns.keys() ^ stored.keys()))}"
        for name, value in columns.items():
            if isinstance(value, np.ndarray) and name in encoded.keys() - raw.keys():  # the encoder's output
                same += int((np.asarray(stored[name]) == value[0]).sum())
                total += value[0].size
            elif not np.array_equal(stored[name], value[0], equal_nan=name == "weight"):
                return f"{name} of image {row // plan.variations} has changed"
    return None if same >= (1 - TOLERATED) * total else f"{total - same} of {total} tokens have changed"


# ------------------------------------------------------------------------------------------------------- captions


def distinct_captions(stream: Stream) -> list[str]:
    """The captions of the data, and the empty one: a dropped caption becomes "" ."""
    return list(dict.fromkeys(["", *(text for texts in stream.dataset.all_captions() for text in texts)]))


def _build_captions(plan: Plan) -> Table:
    """The table of all distinct captions, built again if anything changed."""
    table, encoder = caption_table(plan.folder), plan.encoder

    def find_change() -> tuple[dict[str, Any], bool, str | None]:
        captions = distinct_captions(plan.stream)
        embeddings = stores_embeddings(plan.text_embeddings, len(captions), encoder.embedding_bytes)
        fingerprint = {
            "captions": digest_of_texts([caption] for caption in captions),
            **encoder.caption_key(embeddings),
            **({"precision": plan.precision} if embeddings else {}),
        }
        return fingerprint, embeddings, difference(table.fingerprint, fingerprint)

    fingerprint, embeddings, reason = distributed.on_rank_0(find_change)
    if reason is None:
        return table
    captions = distinct_captions(plan.stream)

    def write(chunks: list[Rows]) -> None:
        progress = Progress(sum(end - first for first, end in chunks), "captions")
        for first, end in chunks:
            columns: dict[str, list[np.ndarray]] = {}
            for start in range(first, end, CAPTION_BATCH):
                batch = captions[start : min(start + CAPTION_BATCH, end)]
                with plan.autocast():
                    encoded = encoder.encode_captions(batch, embeddings)
                for name, column in encoded.items():
                    columns.setdefault(name, []).append(column.numpy())
                progress.add(len(batch))
            arrays = {name: np.concatenate(batches) for name, batches in columns.items()}
            builder.write((first, end), {**arrays, "text": [[caption] for caption in captions[first:end]]})

    builder = TableBuilder(table.file, fingerprint, len(captions))
    return _build(builder, write, plan, "captions")


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


def _lookup(table: Table) -> Callable[[str], dict[str, np.ndarray] | None]:
    """A function from a caption to its row of the table, None for an unknown caption."""
    rows = {text: row for row, (text,) in enumerate(table.texts())}

    def look_up(caption: str) -> dict[str, np.ndarray] | None:
        row = rows.get(caption)
        if row is None:
            return None
        return {name: value for name, value in table[row].items() if isinstance(value, np.ndarray)}

    return look_up


# ------------------------------------------------------------------------------------------------------- building


def _build(builder: TableBuilder, write: Callable[[list[Rows]], None], plan: Plan, what: str) -> Table:
    """The table, its missing chunks written by all ranks, each its share."""
    distributed.on_rank_0(builder.begin)
    missing = distributed.on_rank_0(builder.missing)
    began = time.perf_counter()
    with distributed.all_ranks():
        write(missing[distributed.rank() :: distributed.world_size()])
    plan.seconds[what] = time.perf_counter() - began
    distributed.on_rank_0(builder.finish)
    return Table(builder.file)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One run at a time checks and builds a cache; others wait."""
    with ExitStack() as lock:
        distributed.on_rank_0(lambda: _lock(folder, lock))
        yield


def _lock(folder: Path, lock: ExitStack) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / LOCK).touch()
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return  # nobody can build in a read-only folder, and a complete cache there can be read
        raise
    try:
        lock.enter_context(locked(folder / LOCK))
    except BlockingIOError:
        print_once(f"token cache: another run builds '{folder}'; waiting for it")
        lock.enter_context(locked(folder / LOCK, wait=True))


@final
class Progress:
    """A line every few seconds of long work, of rank 0's share: how much is done, how fast, how long to go."""

    def __init__(self, total: int, what: str, every: float = 10.0) -> None:
        self.total, self.what, self.every = total, what, every
        self.done = 0
        self.began = self.printed = time.perf_counter()

    def add(self, count: int) -> None:
        """Count `count` more as done."""
        self.done += count
        now = time.perf_counter()
        if now - self.printed >= self.every:
            self.printed = now
            rate = self.done / (now - self.began)
            left = format_duration((self.total - self.done) / rate)
            print_once(f"encoded {self.done:,}/{self.total:,} {self.what}, {rate:.3g}/s, {left} left")
