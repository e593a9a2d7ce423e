"""Captioned images from the hub, from Arrow or Parquet files, or from a folder of images."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets as hf
import pyarrow as pa
import pyarrow.compute as pc

from diffengine.datasets.base import ImageDataset, Sample, Size, UnreadableImage, as_list
from diffengine.datasets.folder import (
    CAPTION_COLUMNS,
    METADATA_NAMES,
    Caption,
    is_below,
    is_image,
    list_files,
    read_folder,
)
from diffengine.datasets.images import check_regular, read_image, read_size
from diffengine.errors import UserError, require
from diffengine.files import expanded
from diffengine.text import one_line

BEGINNING = 2**16  # bytes by which the content of a file is known
LONGEST_CAPTION = 100_000  # letters; models read some hundreds
# What `datasets` raises for the user's mistakes: no network, no such data, split or configuration, damaged files.
# (DatasetNotFoundError is an OSError, pyarrow's ArrowInvalid a ValueError. An empty data set on disk is an IndexError.)
LOAD_ERRORS = (OSError, ValueError, IndexError, hf.exceptions.DatasetsError)


class ImageTextDataset(ImageDataset):
    """Captioned images from the Hugging Face hub or from local files.

    Args:
        path: an existing file or folder, else a name on the hub. Locally one of
            - data written by `save_to_disk`,
            - a Parquet file, or a folder of them,
            - an image, or a folder of images with subfolders, in the order of their paths. Captions come from
              metadata.csv or metadata.jsonl (column file_name, relative to that file, in any subfolder), or from a
              NAME.txt per image, in UTF-8.
        split: default "train". A folder of images has only that one.
        image_column: default `image`, or else the only column of images; in metadata files `file_name`.
        caption_column: default the first of `text`, `caption`, `prompt`. It may hold lists of captions, of which the
            stream draws one each time.
        caption: one caption for all images, instead of a column.
        prefix: put before every caption, also before empty ones. Default "".
        captions_from_file_names: "red_fox.jpg" is captioned "red fox". Only for folders of images.
        revision: of a hub data set. Without a network a commit hash is checked; a branch or tag cannot be.
        max_samples: use only the first so many. Default all.
        allow_outside: let the data name images outside of its folder. Links in the folder may lead anywhere.

    Raises:
        UserError: the data does not exist or cannot be used.
    """

    def __init__(
        self, path: str, *, split: str = "train", image_column: str | None = None, caption_column: str | None = None,
        caption: str | None = None, prefix: str = "", captions_from_file_names: bool = False,
        revision: str | None = None, max_samples: int | None = None, allow_outside: bool = False,
    ) -> None:  # fmt: skip
        require(max_samples is None or max_samples >= 1, f"max_samples got {max_samples}; expected at least 1, or None")
        by_name = captions_from_file_names or None
        sources = {"caption": caption, "caption_column": caption_column, "captions_from_file_names": by_name}
        given = [name for name, value in sources.items() if value is not None]
        message = f"got {' and '.join(given)} for {path}; expected one source of captions, so leave out the others"
        require(len(given) <= 1, message)
        local = expanded(path) if path and expanded(path).exists() else None
        require(not (local and revision), f"revision got '{revision}', but local {path} has no revisions; unset it")
        self.path = path
        self.prefix = prefix
        self._caption = caption
        self._inside: Path | None = None  # the folder that images must be in, unless the rows are checked already
        if folder := _find_images(local):
            require(split == "train", f"split got '{split}', but a folder of images has no splits; give a subfolder")
            rows = _rows_of(
                read_folder(
                    *folder,
                    image_column,
                    caption_column,
                    caption,
                    captions_from_file_names,
                    allow_outside=allow_outside,
                )
            )
        else:
            require(by_name is None, f"captions_from_file_names needs a folder of images, and {path} is none; unset it")
            rows = _load(path, local, split, revision)
            if local is not None and not allow_outside:
                self._inside = local if local.is_dir() else local.parent
            rows = _two_columns(rows, path, image_column, caption_column, needs_captions=caption is None)
        self._rows = rows.select(range(min(len(rows), max_samples or len(rows))))
        self._check_captions()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(index, self._rows[index])

    def __getitems__(self, indices: Sequence[int]) -> Iterator[Sample]:
        """The samples of many indices: rows are read together, and each image is decoded when it is taken."""
        rows = self._rows.__getitems__(list(indices))
        return (self._sample(index, row) for index, row in zip(indices, rows))

    def content(self, index: int) -> bytes:
        """The length of its file and the first 64 KiB: all bytes of a large data set take minutes to read."""
        source, name = self._source(index, self._rows[index])
        try:
            check_regular(source)
            if isinstance(source, bytes):
                return len(source).to_bytes(8, "little") + source[:BEGINNING]
            with Path(source).open("rb") as file:
                return os.fstat(file.fileno()).st_size.to_bytes(8, "little") + file.read(BEGINNING)
        except OSError as error:
            raise UnreadableImage(f"{name} cannot be read: {error.strerror}") from error

    def name(self, index: int) -> str:
        with suppress(UnreadableImage):
            return self._source(index, self._rows[index])[1]
        return super().name(index)

    def size(self, index: int) -> Size:
        return read_size(*self._source(index, self._rows[index]))

    def captions(self, index: int) -> list[str]:
        cell = self._rows.select_columns("text")[index]["text"] if self._caption is None else self._caption
        return as_list(self._prefixed(cell))

    def all_captions(self) -> Iterator[list[str]]:
        return (as_list(self._prefixed(cell)) for cell in self._caption_cells())

    def files(self) -> list[Path]:
        """Arrow files, or each image's own file."""
        arrow = [Path(file["filename"]) for file in self._rows.cache_files]
        cells = self._rows.data.column("image")
        if not pa.types.is_struct(cells.type):
            return arrow
        outside = pc.is_null(pc.struct_field(cells, "bytes"))
        paths = pc.struct_field(cells, "path").filter(outside).drop_null()
        return arrow + [Path(path) for path in paths.to_pylist()]

    def _sample(self, index: int, row: dict[str, Any]) -> Sample:
        caption = row["text"] if self._caption is None else self._caption
        return {"image": read_image(*self._source(index, row)), "text": self._prefixed(caption)}

    def _prefixed(self, caption: Caption) -> Caption:
        return self.prefix + caption if isinstance(caption, str) else [self.prefix + text for text in caption]

    def _source(self, index: int, row: dict[str, Any]) -> tuple[bytes | str, str]:
        """The bytes or the path of a row's image, and what errors call it."""
        cell = row["image"]
        encoded, file = (cell["bytes"], cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if not isinstance(encoded, bytes | None) or not isinstance(file, str | None):
            raise UnreadableImage(f"row {index} of {self.path} holds no image; expected bytes, or a path")
        if encoded is not None:
            return encoded, f"row {index} of {self.path}" + (f" ({file})" if file else "")
        if file is None:
            raise UnreadableImage(f"row {index} of {self.path} has no image; remove it, or set skip_unreadable=True")
        if self._inside is not None and not is_below(file, self._inside):
            reason = f"names {file}, which is outside of the data; set allow_outside=True"
            raise UserError(f"row {index} of {self.path} {reason}")
        return file, file

    def _caption_cells(self) -> list[Caption]:
        if self._caption is not None:
            return [self._caption] * len(self)
        return self._rows.select_columns("text")[:]["text"]

    def _check_captions(self) -> None:
        cells: list[Any] = self._caption_cells()
        missing = [row for row, cell in enumerate(cells) if cell is None or cell == [] or None in as_list(cell)]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(cells)} captions of {self.path} are missing, the first in row {missing[0]}; "
                'give each image a text ("" for none)'
            )
        lengths = [max((len(text) for text in as_list(cell)), default=0) for cell in cells]
        if max(lengths, default=0) > LONGEST_CAPTION:
            row = lengths.index(max(lengths))
            raise UserError(f"row {row} of {self.path} has a caption of {lengths[row]:,} letters; expected a caption")


def _find_images(local: Path | None) -> tuple[Path, list[Path]] | None:
    """(folder, its files) if `local` is an image or a folder of images, else None."""
    if local is None or _is_saved(local):
        return None
    if local.is_file():
        return (local.parent, [local]) if is_image(local) else None
    files = list_files(local)
    wanted = any(is_image(file) or file.name in METADATA_NAMES for file in files)
    usable = wanted or any(file.suffix == ".parquet" for file in files)
    require(usable, f"no images in {local}; expected images, Parquet files, or what save_to_disk writes")
    return (local, files) if wanted else None


def _is_saved(local: Path) -> bool:
    """Whether `save_to_disk` wrote this folder, one split or many."""
    return (local / "state.json").exists() or (local / "dataset_dict.json").exists()


def _rows_of(images: Sequence[tuple[str, Caption]]) -> hf.Dataset:
    """Rows of a folder as an Arrow table, which workers share without copying."""
    files, captions = (list(column) for column in zip(*images))
    text: Any = hf.Value("string")
    if any(isinstance(caption, list) for caption in captions):
        captions = [as_list(caption) for caption in captions]
        text = hf.List(text)
    features = hf.Features(image=hf.Image(decode=False), text=text)
    return hf.Dataset.from_dict({"image": files, "text": captions}, features=features)


def _load(path: str, local: Path | None, split: str, revision: str | None) -> hf.Dataset:
    """The rows of one split as `datasets` reads them; every error becomes one line."""
    hf.logging.set_verbosity(logging.CRITICAL)  # what it logs is in the error, too
    try:
        if local is not None:
            with _without_progress():
                return _load_local(local, split)
        is_hub_name = path != "" and not path.startswith((".", "/", "~")) and path.count("/") <= 1
        require(is_hub_name, f"no file or folder {path!r}; expected one that exists, or a hub name as owner/name")
        rows = hf.load_dataset(path, split=split, revision=revision)
    except LOAD_ERRORS as error:
        hub = f"there is no folder {path}, and as a hub data set it"
        what, check = (path, "the files") if local else (hub, "the name, the network")
        reason = one_line(error)[:300]
        raise UserError(f"{what} cannot be loaded: {reason}; check {check} and the split '{split}'") from error
    # Without a network `datasets` silently takes whichever revision is cached.
    cached = {Path(file["filename"]).parent.name for file in rows.cache_files}
    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        message = f"revision {revision} of {path} is not in the cache, which has {', '.join(cached)}"
        require(revision in cached, f"{message}; go online once, or set another revision")
    return rows


@contextmanager
def _without_progress() -> Iterator[None]:
    """Switch the progress bars of `datasets` off: reading local files is quick."""
    shown = not hf.utils.are_progress_bars_disabled()
    hf.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            hf.enable_progress_bars()


def _load_local(local: Path, split: str) -> hf.Dataset:
    if _is_saved(local):
        saved = hf.load_from_disk(str(local))
        splits = saved if isinstance(saved, hf.DatasetDict) else {str(saved.split or "train"): saved}
        require(split in splits, f"{local} has no split '{split}'; it has {', '.join(splits)}; set split")
        return splits[split]
    if local.is_dir():
        return hf.load_dataset("parquet", data_dir=str(local), split=split)
    if local.suffix == ".parquet":
        return hf.load_dataset("parquet", data_files=str(local), split=split)
    raise UserError(f"{local} is neither an image nor a Parquet file; expected one of them, or a folder")


def _two_columns(
    rows: hf.Dataset, path: str, image_column: str | None, caption_column: str | None, *, needs_captions: bool
) -> hf.Dataset:
    """Only the columns `image` (undecoded) and, unless one caption serves all, `text`."""
    images = [name for name, feature in rows.features.items() if isinstance(feature, hf.Image)]
    only = images[0] if len(images) == 1 and "image" not in rows.features else "image"
    chosen = {"image": _column(rows, path, "image_column", image_column or only, _holds_images)}
    if needs_captions:
        known = next((name for name in CAPTION_COLUMNS if name in rows.features), CAPTION_COLUMNS[0])
        chosen["text"] = _column(rows, path, "caption_column", caption_column or known, _holds_text)
    # Data saved to disk may carry a format (torch, numpy): remove it.
    rows = rows.with_format(None).select_columns(list(chosen.values()))
    if isinstance(rows.features[chosen["image"]], hf.Image):
        rows = rows.cast_column(chosen["image"], hf.Image(decode=False))
    return rows.rename_columns({old: new for new, old in chosen.items() if old != new})


def _column(rows: hf.Dataset, path: str, option: str, name: str, fits: Callable[[Any], bool]) -> str:
    columns = ", ".join(rows.features)
    require(name in rows.features, f"{path} has no column '{name}'; it has {columns}; set {option}")
    got, expected = rows.features[name], "images" if option == "image_column" else "text, or lists of texts"
    message = f"column '{name}' of {path} holds {got}; expected {expected}; set {option} to one of {columns}"
    require(fits(got), message)
    return name


def _holds_images(feature: Any) -> bool:
    """Whether a column holds images as `datasets` stores them, or encoded bytes, bare or in a struct with a path."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, hf.Image) or (isinstance(feature, hf.Value) and feature.dtype.endswith("binary"))


def _holds_text(feature: Any) -> bool:
    if isinstance(feature, hf.List | hf.LargeList):
        feature = feature.feature
    return isinstance(feature, hf.Value) and "string" in feature.dtype
