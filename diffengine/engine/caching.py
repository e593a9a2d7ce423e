"""The token cache of a run: decided on, built by all processes, checked, and put in the images' place."""

import errno
import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np

from diffengine import distributed
from diffengine.datasets import Sample, Stream, collate, form_loader
from diffengine.datasets.cache import (
    CachedDataset,
    CachedForms,
    Table,
    TableBuilder,
    captions_of,
    columns_of,
    digest_of,
    digest_of_images,
    digest_of_texts,
    texts_of,
    what_no_table_keeps,
)
from diffengine.engine.optim import StepOptimWrapper
from diffengine.errors import UserError
from diffengine.models.base import Encoder
from diffengine.text import format_bytes, format_duration

CHECKED = 8  # images encoded anew at each start
TOLERATED = 0.01  # of their tokens may differ: another device rounds otherwise, and a tie falls otherwise
EMBEDDINGS = 4e9  # bytes that text_embeddings="auto" may take on disk
CAPTIONS_AT_ONCE = 32
PLACES = ("path", "data", "class_data")  # options of a data set that say where it is, not what it gives
LOCK = ".lock"  # in a cache's folder, before anything else is
NOTES = "files.json"  # of the images' files
Choice = bool | Literal["auto"]
Part = tuple[int, int]  # the first of a table's rows, and the one after its last


@final
class TokenCache:
    """The `token_cache` section: what the frozen encoders make of images and captions, computed once.

    It changes nothing that is learnt: ids equal those computed at each step, id for id, on the same device.

    Args:
        use: "auto" where the run sees each form of an image more than once (a form: one draw of crop and
            flip, `image_variations` of them, or one where nothing varies); True builds it in any case, or
            says why it cannot be; False encodes at each step.
        path: its folder. None: one named by what is encoded, in `cache/` beside the work dir. One that was
            built elsewhere is used without the images.
        text_embeddings: keep the frozen text encoder's outputs as well, in fp32; "auto" up to 4 GB of them.
    """

    def __init__(self, use: Choice = "auto", path: str | None = None, text_embeddings: Choice = "auto") -> None:
        self.use = use
        self.path = None if path is None else Path(path).expanduser()
        self.text_embeddings = text_embeddings

    def stand_in(self) -> CachedDataset | None:
        """A data set of what the cache at `path` holds, for a machine without the images."""
        if self.path is None or not self.use:
            return None
        table = Table(_images(self.path))
        return None if table.made_of is None else CachedDataset(CachedForms(table, table.made_of["forms"]))


@dataclass
class Plan:
    """The cache of a run.

    Attributes:
        folder: where it is, or will be.
        key: what its table of images depends on, but for the images and captions themselves.
        forms: of each image.
        encoder: the model's.
        imageless: the images are not here, and it is all that there is of them.
    """

    folder: Path
    key: dict[str, Any]
    forms: int
    encoder: Encoder
    imageless: bool

    @property
    def images(self) -> Table:
        return Table(_images(self.folder))


def plan(
    cache: TokenCache,
    stream: Stream,
    encoder: Encoder | None,
    resolved: Mapping[str, Any],
    work_dir: Path,
    positions: int,
) -> Plan | str:
    """The cache that a run takes; or why it takes none.

    Args:
        positions: samples that the whole run takes.

    Raises:
        UserError: it is asked for and cannot be; or the images are not here, and something else changed.
    """
    imageless = isinstance(stream.dataset, CachedDataset)
    reason = "as configured" if not cache.use else _why_not(cache, stream, encoder, positions)
    if reason and (cache.use is True or imageless):
        raise UserError(f"the cache cannot be used: {reason}")
    if reason or encoder is None or stream.forms is None:
        return reason or ""
    section, forms = resolved["train_dataloader"], stream.forms
    key = distributed.on_rank_0(
        lambda: {
            "data set": {name: value for name, value in section["dataset"].items() if name not in PLACES},
            "image transforms": section["image_transforms"],
            "image_variations": stream.image_variations,
            "forms": forms,
            "seed": stream.seed if forms > 1 else None,
            **encoder.image_key(),
        }
    )
    folder = cache.path or work_dir.parent / "cache" / digest_of([section["dataset"], key])[:12]
    distributed.on_rank_0(lambda: _check_place(folder))
    found = Plan(folder, key, forms, encoder, imageless)
    if imageless:
        distributed.on_rank_0(lambda: _check_without_images(found))
    return found


def attach(
    cache: TokenCache,
    stream: Stream,
    encoder: Encoder | None,
    optim: StepOptimWrapper,
    resolved: Mapping[str, Any],
    work_dir: Path,
    positions: int,
) -> None:
    """Let the stream and the model take what can be computed once from the cache, building it if need be.

    Arguments and problems as of `plan`.
    """
    found = plan(cache, stream, encoder, resolved, work_dir, positions)
    if isinstance(found, str):
        if cache.use and encoder is not None:
            _say(f"token cache: none, since {found}")
        return
    workers = resolved["train_dataloader"].get("num_workers", 0)
    with _locked(found.folder):
        table = found.images if found.imageless else _image_table(found, stream, workers)
        captions = _caption_table(found, cache, stream, optim)
    found.encoder.rest()
    stream.cache = CachedForms(table, found.forms)
    found.encoder.use_captions(CaptionLookup(captions))
    seen = positions / len(table)
    _say(
        f"token cache: {len(stream.dataset)} images in {spell_forms(found.forms)}, each form is taken "
        f"{seen:.3g} times; {format_bytes(table.nbytes + captions.nbytes)} in {found.folder}"
    )


def _why_not(cache: TokenCache, stream: Stream, encoder: Encoder | None, positions: int) -> str | None:
    """Why a cache is of no use, or cannot be."""
    if encoder is None:
        return "this model learns from pixels; set cache=False"
    if stream.forms is None:
        return "crop and flip are drawn anew each time; set image_variations to how many to keep of an image"
    imageless = isinstance(stream.dataset, CachedDataset)
    if cache.use == "auto" and not imageless and positions <= len(stream.dataset) * stream.forms:
        return "the run takes each form at most once; set cache=True to build it all the same"
    if not imageless:
        (sample,) = stream.image_forms([0])
        if sample is not None and (other := what_no_table_keeps(sample)):
            return f"it keeps tensors and numbers, but a sample has {other}; leave that out, or set cache=False"
    return None


def _images(folder: Path) -> Path:
    return folder / "pictures.arrow"


def _captions(folder: Path) -> Path:
    return folder / "captions.arrow"


def _check_place(folder: Path) -> None:
    """Raises UserError where a cache cannot be, or where files of another kind have the names of its own."""
    blocking = [place for place in (folder, *folder.parents) if place.exists() and not place.is_dir()]
    if blocking:
        raise UserError(f"the cache '{folder}' cannot be there: '{blocking[0]}' is no folder; set cache_path")
    tables = [_images(folder), _captions(folder)]
    if (folder / LOCK).exists() or any(Table(file).made_of is not None for file in tables):
        return
    own = [*tables, *(file.with_suffix(".json") for file in tables), folder / NOTES]
    if there := [file.name for file in own if file.exists()]:
        raise UserError(
            f"the cache would overwrite {', '.join(there)} in '{folder}', which no cache has written; set "
            "cache_path to a folder that is new or empty"
        )


# ------------------------------------------------------------------------------------------------ images


def _image_table(found: Plan, stream: Stream, workers: int) -> Table:
    """The table of this data, whose bytes and a few of whose images were looked at; built if need be."""
    table, encoder, forms = found.images, found.encoder, found.forms

    def changed() -> tuple[dict[str, Any], str | None]:
        made_of = {
            "pictures": digest_of_images(stream.dataset, found.folder / NOTES),
            "captions": digest_of_texts(texts_of(stream.dataset)),
            **found.key,
        }
        return made_of, difference(table, made_of) or _check_images(table, stream, found)

    made_of, reason = distributed.on_rank_0(changed)
    if reason is None:
        distributed.on_rank_0(TableBuilder(table.file, made_of, 0).sweep)
        return table
    _say(f"token cache: {reason}; encoding {len(stream.dataset)} images in {spell_forms(forms)}")
    with distributed.all_ranks():
        template = first_readable(stream, encoder)
    builder = TableBuilder(table.file, made_of, len(stream.dataset) * forms)
    distributed.on_rank_0(lambda: _check_room(builder, template))

    def write(parts: list[Part]) -> None:
        size = encoder.batch_size
        chunks = [
            list(range(start, min(start + size, end))) for first, end in parts for start in range(first, end, size)
        ]
        read = iter(form_loader(stream, chunks, workers))
        progress = Progress(sum(end - first for first, end in parts), "forms" if forms > 1 else "images")
        for first, end in parts:
            samples: list[Sample | None] = []
            while len(samples) < end - first:
                fresh = encode(next(read), encoder)
                samples += fresh
                progress.add(len(fresh))
            builder.write((first, end), columns_of(samples, template))

    return _build(builder, write)


def encode(samples: list[Sample | None], encoder: Encoder) -> list[Sample | None]:
    """Samples with what the encoder gives in the place of their images."""
    images = [{"image": sample["image"]} for sample in samples if sample is not None]
    if not images:
        return samples
    columns = encoder.encode_images(collate(images)["image"])
    rows = ({name: column[place] for name, column in columns.items()} for place in range(len(images)))
    return [
        None if sample is None else {**{key: value for key, value in sample.items() if key != "image"}, **next(rows)}
        for sample in samples
    ]


def first_readable(stream: Stream, encoder: Encoder) -> Sample:
    """A sample as the table keeps it, whatever it is of."""
    assert stream.forms is not None
    for index in range(len(stream.dataset)):
        (sample,) = encode(stream.image_forms([index * stream.forms]), encoder)
        if sample is not None:
            return sample
    raise UserError(f"none of the {len(stream.dataset)} images can be read")


def _check_room(builder: TableBuilder, template: Sample) -> None:
    """Raises UserError where the disk has no room for the table and its parts, as far as they are missing."""
    arrays = [value for value in columns_of([template], template).values() if isinstance(value, np.ndarray)]
    rows = builder.parts[-1][1] + sum(end - first for first, end in builder.missing())
    need = rows * sum(array.nbytes for array in arrays)
    free = shutil.disk_usage(builder.file.parent).free
    if builder.file.exists():
        free += Table(builder.file).nbytes  # which goes before the build
    if need > free:
        raise UserError(
            f"the cache needs {format_bytes(need)} while it is built and '{builder.file.parent}' has "
            f"{format_bytes(free)} free; make room, set cache_path to another disk, or cache=False"
        )


def difference(table: Table, made_of: Mapping[str, Any]) -> str | None:
    """Why a table has to be built: what of its making differs."""
    if table.made_of is None:
        return "none is there yet"
    before = table.made_of
    names = [
        name
        for name in dict.fromkeys([*made_of, *before])
        if json.dumps(before.get(name)) != json.dumps(made_of.get(name))
    ]
    return f"changed since it was built: {', '.join(names)}" if names else None


def _check_images(table: Table, stream: Stream, found: Plan) -> str | None:
    """Encode a few images anew; what differs from the table, if it is more than rounding."""
    rows = np.unique(np.linspace(0, len(table) - 1, CHECKED).round().astype(int)).tolist()
    size = found.encoder.batch_size
    pieces = [stream.image_forms(rows[start : start + size]) for start in range(0, len(rows), size)]
    fresh = [pair for piece in pieces for pair in zip(piece, encode(piece, found.encoder))]
    same = total = 0
    for row, (read, sample) in zip(rows, fresh):
        if read is None or sample is None:
            continue
        kept = table[row]
        columns = columns_of([sample], sample)
        if columns.keys() != kept.keys():
            return f"samples have {', '.join(sorted(columns.keys() ^ kept.keys()))} other than before"
        for name, value in columns.items():
            if isinstance(value, np.ndarray) and name in sample.keys() - read.keys():  # what was encoded
                same += int((np.asarray(kept[name]) == value[0]).sum())
                total += value[0].size
            elif not np.array_equal(kept[name], value[0], equal_nan=name == "weight"):
                return f"{name} of image {row // found.forms} is another now"
    return None if same >= (1 - TOLERATED) * total else f"{total - same} of {total} tokens come out otherwise now"


def _check_without_images(found: Plan) -> None:
    table = found.images
    known = table.made_of or {}
    same = {name: known.get(name) for name in ("pictures", "captions")}  # of what is not here
    if reason := difference(table, {**same, **found.key}):
        raise UserError(
            f"the cache '{found.folder}' does not fit this run, and the images to build it anew are not here: {reason}"
        )


# ------------------------------------------------------------------------------------------------ captions


def distinct_captions(stream: Stream) -> list[str]:
    """Those of the data, and the empty one: what a dropped caption becomes."""
    return list(dict.fromkeys(["", *captions_of(stream.dataset)]))


def _caption_table(found: Plan, cache: TokenCache, stream: Stream, optim: StepOptimWrapper) -> Table:
    """The table of all distinct captions."""
    file, encoder = _captions(found.folder), found.encoder

    def changed() -> tuple[dict[str, Any], bool, str | None]:
        captions = distinct_captions(stream)
        embeddings = wants_embeddings(cache.text_embeddings, len(captions), encoder.embedding_bytes)
        made_of = {"captions": digest_of_texts(captions), **encoder.caption_key(embeddings)}
        if embeddings:
            made_of["precision"] = optim.precision
        return made_of, embeddings, difference(Table(file), made_of)

    made_of, embeddings, reason = distributed.on_rank_0(changed)
    if reason is None:
        return Table(file)
    captions = distinct_captions(stream)
    builder = TableBuilder(file, made_of, len(captions))

    def write(parts: list[Part]) -> None:
        progress = Progress(sum(end - first for first, end in parts), "captions")
        for first, end in parts:
            columns: dict[str, list[np.ndarray]] = {}
            for start in range(first, end, CAPTIONS_AT_ONCE):
                some = captions[start : min(start + CAPTIONS_AT_ONCE, end)]
                with optim.autocast():
                    encoded = encoder.encode_captions(some, embeddings)
                for name, column in encoded.items():
                    columns.setdefault(name, []).append(column.numpy())
                progress.add(len(some))
            arrays = {name: np.concatenate(pieces) for name, pieces in columns.items()}
            builder.write((first, end), {**arrays, "text": [[caption] for caption in captions[first:end]]})

    return _build(builder, write)


def wants_embeddings(wish: Choice, captions: int, each: int | None) -> bool:
    """Whether so many captions, `each` of so many bytes, are kept embedded."""
    if wish is True and each is None:
        raise UserError("text_embeddings=True, but the text encoder is trained, so its outputs change; leave it out")
    return each is not None and (wish is True or (wish == "auto" and captions * each <= EMBEDDINGS))


@final
class CaptionLookup:
    """What the table of captions has of one."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._rows = {text: row for row, (text,) in enumerate(table.texts())}

    def __call__(self, caption: str) -> dict[str, np.ndarray] | None:
        row = self._rows.get(caption)
        if row is None:
            return None
        return {name: value for name, value in self._table[row].items() if isinstance(value, np.ndarray)}


# ------------------------------------------------------------------------------------------------ building


def _build(builder: TableBuilder, write: Callable[[list[Part]], None]) -> Table:
    """The table, its missing parts written by all ranks together, each its share."""
    distributed.on_rank_0(builder.begin)
    missing = distributed.on_rank_0(builder.missing)
    with distributed.all_ranks():
        write(missing[distributed.rank() :: distributed.world_size()])
    distributed.on_rank_0(builder.finish)
    return Table(builder.file)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One run at a time looks at a cache and builds it; another waits."""
    with ExitStack() as held:
        distributed.on_rank_0(lambda: _lock(folder, held))
        yield


def _lock(folder: Path, held: ExitStack) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        file = held.enter_context((folder / LOCK).open("w"))
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return  # where nothing can be written, nobody builds: a complete cache can be read all the same
        raise
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _say(f"token cache: another run builds '{folder}'; waiting for it")
        fcntl.flock(file, fcntl.LOCK_EX)


@final
class Progress:
    """A line every few seconds of long work, of rank 0's share: how much is done, how fast, how long yet."""

    def __init__(self, total: int, what: str, every: float = 10.0) -> None:
        self.total, self.what, self.every = total, what, every
        self.done = 0
        self.began = self.told = time.perf_counter()

    def add(self, count: int) -> None:
        """So much more is done."""
        self.done += count
        now = time.perf_counter()
        if now - self.told >= self.every:
            self.told = now
            rate = self.done / (now - self.began)
            left = format_duration((self.total - self.done) / rate)
            _say(f"encoded {self.done:,}/{self.total:,} {self.what}, {rate:.3g}/s, {left} left")


def spell_forms(forms: int) -> str:
    return "one form" if forms == 1 else f"{forms} forms each"


def _say(line: str) -> None:
    if distributed.rank() == 0:
        print(line, flush=True)
