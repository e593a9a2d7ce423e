"""Captioned images from the hub, from Arrow or Parquet files, or from a folder of images."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets as hf
import pyarrow as pa
import pyarrow.compute as pc

from diffengine.datasets.base import ImageDataset, Sample, Size, UnreadableImage, as_list
from diffengine.datasets.folder import CAPTION_COLUMNS, METADATA_NAMES, Caption, is_image, list_files, read_folder
from diffengine.datasets.images import read_image, read_size
from diffengine.errors import UserError
from diffengine.text import one_line

# What `datasets` raises for the user's mistakes: no network, no such data, split or configuration, damaged files.
# (DatasetNotFoundError is an OSError, pyarrow's ArrowInvalid a ValueError. An empty data set on disk is an IndexError.)
LOAD_ERRORS = (OSError, ValueError, IndexError, hf.exceptions.DatasetsError)


class ImageTextDataset(ImageDataset):
    """Captioned images from the Hugging Face hub or from local files.

    Args:
        path: an existing file or folder, else a name on the hub. Locally one of
            - data written by `save_to_disk`,
            - a Parquet file, or a folder of them,
            - an image, or a folder of images with subfolders. Captions come from metadata.csv or metadata.jsonl (column
              file_name, relative to that file, in any subfolder), or from a NAME.txt per image, in UTF-8. The order is
              by path.
        split: default "train". A folder of images has only that one.
        image_column: default `image`, or else the only column of images; in metadata files `file_name`.
        caption_column: default the first of `text`, `caption`, `prompt`. It may hold lists of captions, of which the
            stream draws one each time.
        caption: one caption for all images, instead of a column.
        prefix: put before every caption, also before empty ones. Default "".
        captions_from_file_names: "red_fox.jpg" is captioned "red fox". Only for folders of images.
        revision: of a hub data set. Without a network a commit hash is checked; a branch or tag cannot be.
        max_samples: use only the first so many. Default all.

    Raises:
        UserError: the data does not exist or cannot be used.
    """

    def __init__(
        self,
        path: str,
        *,
        split: str = "train",
        image_column: str | None = None,
        caption_column: str | None = None,
        caption: str | None = None,
        prefix: str = "",
        captions_from_file_names: bool = False,
        revision: str | None = None,
        max_samples: int | None = None,
    ) -> None:
        if max_samples is not None and max_samples < 1:
            raise UserError(f"max_samples got {max_samples}; expected at least 1, or None for all")
        given = {
            "caption": caption is not None,
            "caption_column": caption_column is not None,
            "captions_from_file_names": captions_from_file_names,
        }
        if sum(given.values()) > 1:
            names = " and ".join(name for name, is_given in given.items() if is_given)
            raise UserError(f"got {names} for {path}; expected one source of captions, so leave out the others")
        self.path = path
        self.prefix = prefix
        self._caption = caption
        folder = _find_images(path)
        if folder is None:
            if captions_from_file_names:
                raise UserError(f"captions_from_file_names needs a folder of images, and {path} is none; leave it out")
            rows = _load(path, split, revision)
            rows = _two_columns(rows, path, image_column, caption_column, needs_captions=caption is None)
        else:
            _refuse_hub_options(path, split, revision)
            images = read_folder(
                *folder,
                image_column=image_column,
                caption_column=caption_column,
                caption=caption,
                captions_from_file_names=captions_from_file_names,
            )
            rows = _rows_of(images)
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
        image = read_image(*self._source(index, row))
        return {"image": image, "text": self._prefixed(row["text"] if self._caption is None else self._caption)}

    def _prefixed(self, caption: Caption) -> Caption:
        return self.prefix + caption if isinstance(caption, str) else [self.prefix + text for text in caption]

    def _source(self, index: int, row: dict[str, Any]) -> tuple[bytes | str, str]:
        """The bytes or the path of a row's image, and what errors call it."""
        cell = row["image"]
        encoded, file = (cell["bytes"], cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if encoded is not None:
            return encoded, f"row {index} of {self.path}" + (f" ({file})" if file else "")
        if file is None:
            raise UnreadableImage(f"row {index} of {self.path} has no image; remove it, or set skip_unreadable=True")
        return file, file

    def _caption_cells(self) -> list[Caption]:
        if self._caption is not None:
            return [self._caption] * len(self)
        return self._rows.select_columns("text")[:]["text"]

    def _check_captions(self) -> None:
        cells = self._caption_cells()
        missing = [row for row, cell in enumerate(cells) if _is_missing(cell)]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(cells)} captions of {self.path} are missing, the first in row {missing[0]}; "
                'give each image a text ("" for none)'
            )


def _is_missing(cell: Any) -> bool:
    return cell is None or (not isinstance(cell, str) and (len(cell) == 0 or None in cell))


def _find_images(path: str) -> tuple[Path, list[Path]] | None:
    """(folder, its files) if `path` is an image or a folder of images, else None."""
    local = Path(path).expanduser()
    if not path or not local.exists() or _is_saved(local):
        return None
    if local.is_file():
        return (local.parent, [local]) if is_image(local) else None
    files = list_files(local)
    wanted = any(is_image(file) or file.name in METADATA_NAMES for file in files)
    if not wanted and not any(file.suffix == ".parquet" for file in files):
        raise UserError(f"no images in {path}; expected images, Parquet files, or what save_to_disk writes")
    return (local, files) if wanted else None


def _is_saved(local: Path) -> bool:
    """Whether `save_to_disk` wrote this folder, one split or many."""
    return (local / "state.json").exists() or (local / "dataset_dict.json").exists()


def _rows_of(images: Sequence[tuple[str, Caption]]) -> hf.Dataset:
    """Rows of a folder as an Arrow table, which workers share without copying."""
    files, captions = (list(column) for column in zip(*images))
    text: Any = hf.Value("string")
    if any(isinstance(caption, list) for caption in captions):
        captions = [[caption] if isinstance(caption, str) else caption for caption in captions]
        text = hf.List(text)
    return hf.Dataset.from_dict(
        {"image": files, "text": captions}, features=hf.Features(image=hf.Image(decode=False), text=text)
    )


def _refuse_hub_options(path: str, split: str, revision: str | None) -> None:
    if split != "train":
        raise UserError(f"split got '{split}', but a folder of images has no splits; give the path of a subfolder")
    if revision is not None:
        raise UserError(f"revision got '{revision}', but {path} is local and has no revisions; leave it out")


def _load(path: str, split: str, revision: str | None) -> hf.Dataset:
    """The rows of one split as `datasets` reads them; every error becomes one line."""
    local = Path(path).expanduser()
    try:
        if path and local.exists():
            _refuse_hub_options(path, "train", revision)
            return _load_local(local, split)
        if not path or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise UserError(f"no file or folder {path!r}; expected one that exists, or a hub name as owner/name")
        rows = hf.load_dataset(path, split=split, revision=revision)
    except LOAD_ERRORS as error:
        what, check = f"there is no folder {path}, and as a hub data set it", "the name, the network"
        if local.exists():
            what, check = path, "the files"
        reason = one_line(error)[:300]
        raise UserError(f"{what} cannot be loaded: {reason}; check {check} and the split '{split}'") from error
    _check_revision(rows, path, revision)
    return rows


def _load_local(local: Path, split: str) -> hf.Dataset:
    if _is_saved(local):
        saved = hf.load_from_disk(str(local))
        splits = saved if isinstance(saved, hf.DatasetDict) else {str(saved.split or "train"): saved}
        if split not in splits:
            raise UserError(f"{local} has no split '{split}'; it has {', '.join(splits)}; set split")
        return splits[split]
    if local.is_dir():
        return hf.load_dataset("parquet", data_dir=str(local), split=split)
    if local.suffix == ".parquet":
        return hf.load_dataset("parquet", data_files=str(local), split=split)
    raise UserError(f"{local} is neither an image nor a Parquet file; expected one of them, or a folder")


def _check_revision(rows: hf.Dataset, path: str, revision: str | None) -> None:
    """Check the revision: without a network `datasets` silently takes whichever is cached."""
    cached = {Path(file["filename"]).parent.name for file in rows.cache_files}
    if revision and re.fullmatch("[0-9a-f]{40}", revision) and revision not in cached:
        raise UserError(
            f"revision {revision} of {path} is not in the cache, which has {', '.join(cached)}; "
            "go online once, or set another revision"
        )


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
    if name not in rows.features:
        raise UserError(f"{path} has no column '{name}'; it has {', '.join(rows.features)}; set {option}")
    if not fits(rows.features[name]):
        expected = "images" if option == "image_column" else "text, or lists of texts"
        columns = ", ".join(rows.features)
        raise UserError(
            f"column '{name}' of {path} holds {rows.features[name]}; expected {expected}; "
            f"set {option} to one of {columns}"
        )
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
