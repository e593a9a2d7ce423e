"""Captioned images from the hub, from Arrow or Parquet files, or from a folder of images."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets as hf
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.constants import HF_HUB_CACHE

from diffengine.datasets.base import ImageDataset, Sample, Size, UnreadableImage, as_list
from diffengine.datasets.folder import (
    CAPTION_COLUMNS,
    METADATA_NAMES,
    Caption,
    Columns,
    Problems,
    Row,
    check_inside,
    is_image,
    list_files,
    problem_of_caption,
    read_folder,
)
from diffengine.datasets.images import check_mask_size, read_image, read_mask, read_size
from diffengine.errors import UserError, require
from diffengine.files import check_regular, expanded, read_json
from diffengine.terminal import on_terminal
from diffengine.text import one_line

BEGINNING = 2**16  # bytes by which the content of a file is known


class ImageTextDataset(ImageDataset):
    """Captioned images from the Hugging Face hub or from local files.

    Args:
        path: an existing file or folder, else a name on the hub; in a config also a list, see `Sources`. Locally one of
            - data written by `save_to_disk`,
            - a Parquet file, or a folder of them,
            - an image, or a folder of images with subfolders, in the order of their paths. Captions come from
              metadata.csv or metadata.jsonl (column file_name, relative to that file, in any subfolder), or from a
              NAME.txt per image, in UTF-8: a caption per line, of which the stream draws one each time; blank lines are
              ignored. NAME.mask.png is the mask of an image, of its size: white is learnt, black is not (see
              `unmasked_weight` of `train_dataloader`), grey in between. An image without a mask counts whole.
        split: default "train". A folder of images has only that one.
        image_column: default `image`, or else the only column of images; in metadata files `file_name`.
        caption_column: default the first of `text`, `caption`, `prompt`. It may hold lists of captions, of which the
            stream draws one each time.
        mask_column: of masks, in metadata files their paths; empty for an image that counts whole.
        caption: one caption for all images, instead of a column.
        prefix: put before every caption, also before empty ones. Default "".
        captions_from_file_names: "red_fox.jpg" is captioned "red fox". Only for folders of images.
        revision: of a hub data set. Without a network a commit hash is checked; a branch or tag cannot be.
        max_samples: use only the first so many. Default all.
        allow_outside: read images that metadata or a table names outside of the data's folder, by `..` or an absolute
            path. Default False: who made the data would choose which of your files are trained. Links inside the
            folder are followed.

    Raises:
        UserError: the data does not exist or cannot be used.
    """

    def __init__(
        self, path: str | list[str | dict], *, split: str = "train",
        image_column: str | None = None, caption_column: str | None = None,
        caption: str | None = None, prefix: str = "", captions_from_file_names: bool = False,
        revision: str | None = None, max_samples: int | None = None, allow_outside: bool = False,
        mask_column: str | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(path, str):
            raise UserError(f"path got {path!r:.200}; expected a text; Sources takes a list")
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
        if folder := _find_images(local):
            require(split == "train", f"split got '{split}', but a folder of images has no splits; give a subfolder")
            columns = Columns(image_column, caption_column, mask_column)
            rows = _rows_of(read_folder(*folder, columns, caption, captions_from_file_names, allow_outside))
        else:
            require(by_name is None, f"captions_from_file_names needs a folder of images, and {path} is none; unset it")
            rows = _load(path, local, split, revision)
            columns = Columns(image_column, caption_column, mask_column)
            rows = _columns_of(rows, path, columns, needs_captions=caption is None)
            if not allow_outside:
                check_inside(_folders_of(local), _paths_in(rows))
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
        source, name = self.encoded(index)
        try:
            if isinstance(source, bytes):
                return len(source).to_bytes(8, "little") + source[:BEGINNING]
            size = check_regular(source).st_size
            with Path(source).open("rb") as file:
                return size.to_bytes(8, "little") + file.read(BEGINNING)
        except OSError as error:
            raise UnreadableImage(f"{name} cannot be read: {error.strerror}") from error

    def encoded(self, index: int) -> tuple[bytes | str, str]:
        return self._source(index, self._rows[index])

    def encoded_mask(self, index: int) -> tuple[bytes | str, str] | None:
        return self._mask_source(index, self._rows[index])

    def name(self, index: int) -> str:
        with suppress(UnreadableImage):
            return self.encoded(index)[1]
        return super().name(index)

    def size(self, index: int) -> Size:
        return read_size(*self.encoded(index))

    @property
    def has_masks(self) -> bool:
        return "mask" in self._rows.features

    def captions(self, index: int) -> list[str]:
        cell = self._rows.select_columns("text")[index]["text"] if self._caption is None else self._caption
        return as_list(self._prefixed(cell))

    def all_captions(self) -> Iterator[list[str]]:
        return (as_list(self._prefixed(cell)) for cell in self._caption_cells())

    def files(self) -> list[Path]:
        """Arrow files, or each image's own file and then its mask's."""
        return [Path(file["filename"]) for file in self._rows.cache_files] + list(map(Path, _paths_in(self._rows)))

    def _sample(self, index: int, row: dict[str, Any]) -> Sample:
        caption = row["text"] if self._caption is None else self._caption
        sample: Sample = {"image": read_image(*self._source(index, row)), "text": self._prefixed(caption)}
        source = self._mask_source(index, row)
        if source is None:
            return sample
        mask = read_mask(*source)
        check_mask_size(source[1], mask.size, self._source(index, row)[1], sample["image"].size)
        return {**sample, "mask": mask}

    def _prefixed(self, caption: Caption) -> Caption:
        return self.prefix + caption if isinstance(caption, str) else [self.prefix + text for text in caption]

    def _mask_source(self, index: int, row: dict[str, Any]) -> tuple[bytes | str, str] | None:
        encoded, file = _bytes_and_path(row.get("mask"))
        if encoded is not None:
            return encoded, f"the mask in row {index} of {self.path}"
        return None if file is None else (file, file)

    def _source(self, index: int, row: dict[str, Any]) -> tuple[bytes | str, str]:
        """The bytes or the path of a row's image, and what errors call it."""
        encoded, file = _bytes_and_path(row["image"])
        if encoded is not None:
            return encoded, f"row {index} of {self.path}" + (f" ({file})" if file else "")
        if file is None:
            raise UnreadableImage(
                f"row {index} of {self.path} has no image; remove it, or set --cfg-options skip_unreadable=True"
            )
        return file, file

    def _caption_cells(self) -> list[Caption]:
        if self._caption is not None:
            return [self._caption] * len(self)
        return self._rows.select_columns("text")[:]["text"]

    def _check_captions(self) -> None:
        cells, problems = self._caption_cells(), Problems()
        missing = [row for row, cell in enumerate(cells) if cell is None or cell == [] or None in as_list(cell)]
        if missing:
            problems.add(
                "missing captions",
                f"{len(missing)} of {len(cells)} captions of {self.path} are missing, the first in row {missing[0]}; "
                'give each image a text ("" for none)',
            )
        for row, cell in enumerate(cells):
            for text in as_list(cell or []):
                if text is not None and (problem := problem_of_caption(text)):
                    problems.add("captions", f"the caption in row {row} of {self.path} {problem}; change it")
        problems.raise_all(self.path)


def _bytes_and_path(cell: Any) -> tuple[bytes | None, str | None]:
    """What a cell of a column of images holds."""
    return (cell["bytes"], cell.get("path")) if isinstance(cell, dict) else (cell, None)


def _find_images(local: Path | None) -> tuple[Path, list[Path]] | None:
    """(folder, its files) if `local` is an image or a folder of images, else None."""
    if local is None or _is_saved(local):
        return None
    if local.is_file():
        return (local.parent, [local]) if is_image(local) else None
    require(
        local.is_dir(), f"{local} cannot be read: it is no regular file; expected an image, a Parquet file or a folder"
    )
    files = list_files(local)
    wanted = any(is_image(file) or file.name in METADATA_NAMES for file in files)
    usable = wanted or any(file.suffix == ".parquet" for file in files)
    require(usable, f"no images in {local}; expected images, Parquet files, or what save_to_disk writes")
    return (local, files) if wanted else None


def _is_saved(local: Path) -> bool:
    """Whether `save_to_disk` wrote this folder, one split or many."""
    return (local / "state.json").exists() or (local / "dataset_dict.json").exists()


def _paths_in(rows: hf.Dataset) -> list[str]:
    """Each image's own file and then its mask's, of those that the table does not hold itself."""
    columns = [_paths_of(rows.data.column(name)) for name in ("image", "mask") if name in rows.features]
    return [path for row in zip(*columns) for path in row if path is not None]


def _paths_of(cells: Any) -> list[str | None]:
    if not pa.types.is_struct(cells.type) or cells.type.get_field_index("path") < 0:
        return [None] * len(cells)
    paths, encoded = (pc.struct_field(cells, name) for name in ("path", "bytes"))
    return pc.if_else(pc.is_null(encoded), paths, pa.scalar(None, paths.type)).to_pylist()


def _folders_of(local: Path | None) -> list[Path]:
    """The folders that a table's images must be in; of a hub data set, those that `datasets` downloads to."""
    if local is None:
        return [Path(hf.config.HF_DATASETS_CACHE), Path(hf.config.DOWNLOADED_DATASETS_PATH), Path(HF_HUB_CACHE)]
    return [local if local.is_dir() else local.parent]


def _rows_of(images: Sequence[Row]) -> hf.Dataset:
    """Rows of a folder as an Arrow table, which workers share without copying."""
    files, captions, masks = (list(column) for column in zip(*images))
    text: Any = hf.Value("string")
    if any(isinstance(caption, list) for caption in captions):
        captions = [as_list(caption) for caption in captions]
        text = hf.List(text)
    features = hf.Features(image=hf.Image(decode=False), text=text)
    columns = {"image": files, "text": captions}
    if any(mask is not None for mask in masks):
        features["mask"], columns["mask"] = hf.Image(decode=False), masks
    return hf.Dataset.from_dict(columns, features=features)


def _load(path: str, local: Path | None, split: str, revision: str | None) -> hf.Dataset:
    """The rows of one split as `datasets` reads them; every error becomes one line."""
    if not on_terminal():  # a file would get the bars next to our lines
        hf.disable_progress_bars()
    if os.environ.get("DATASETS_VERBOSITY", "error") == "error":
        hf.logging.set_verbosity(hf.logging.CRITICAL)  # it logs each error that it raises
    try:
        if local is not None:
            return _load_local(local, split)
        is_hub_name = path != "" and not path.startswith((".", "/", "~")) and path.count("/") <= 1
        require(is_hub_name, f"no file or folder {path!r}; expected one that exists, or a hub name as owner/name")
        rows = hf.load_dataset(path, split=split, revision=revision)
    except UserError:
        raise
    except Exception as error:  # `datasets` checks little of what it reads
        hub = f"there is no folder {path}, and as a hub data set it"
        what, check = (path, "the files") if local else (hub, "the name, the network")
        reason = one_line(error.__cause__ if isinstance(error, DatasetGenerationError) else error)[:300]
        raise UserError(f"{what} cannot be loaded: {reason}; check {check} and the split '{split}'") from error
    # Without a network `datasets` silently takes whichever revision is cached.
    cached = {Path(file["filename"]).parent.name for file in rows.cache_files}
    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        message = f"revision {revision} of {path} is not in the cache, which has {', '.join(cached)}"
        require(revision in cached, f"{message}; go online once, or set another revision")
    return rows


def _load_local(local: Path, split: str) -> hf.Dataset:
    if _is_saved(local):
        _check_saved(local)
        saved = hf.load_from_disk(str(local))
        splits = saved if isinstance(saved, hf.DatasetDict) else {str(saved.split or "train"): saved}
        require(
            split in splits, f"{local} has no split '{split}'; it has {', '.join(splits)}; set --cfg-options split=NAME"
        )
        return splits[split]
    is_table = local.is_dir() or local.suffix == ".parquet"
    require(is_table, f"{local} is neither an image nor a Parquet file; expected one of them, or a folder")
    for file in list_files(local) if local.is_dir() else [local]:
        check_regular(file)
    return hf.load_dataset("parquet", **{"data_dir" if local.is_dir() else "data_files": str(local)}, split=split)


def _check_saved(folder: Path) -> None:
    """Refuse a folder of `save_to_disk` whose JSON files name splits or tables outside of it."""
    split_names, files = folder / "dataset_dict.json", []
    if split_names.exists():
        names = read_json(split_names).get("splits")
        folders = [folder / name for name in _plain_names(names, split_names)]
    else:
        folders = [folder]
    for item in folders:
        entries = read_json(item / "state.json").get("_data_files")
        read_json(item / "dataset_info.json")
        names = [entry.get("filename") for entry in entries] if isinstance(entries, list) else None
        files += [item / name for name in _plain_names(names, item / "state.json")]
    for file in files:
        check_regular(file)


def _plain_names(names: Any, file: Path) -> list[str]:
    plain = isinstance(names, list) and all(isinstance(name, str) and Path(name).name == name for name in names)
    require(plain, f"'{file}' names {str(names)[:200]}; expected files in its own folder")
    return names


def _columns_of(rows: hf.Dataset, path: str, asked: Columns, *, needs_captions: bool) -> hf.Dataset:
    """Only the columns `image` (undecoded), unless one caption serves all `text`, and with masks `mask` (undecoded)."""
    images = [name for name, feature in rows.features.items() if isinstance(feature, hf.Image)]
    only = images[0] if len(images) == 1 and "image" not in rows.features else "image"
    chosen = {"image": _column(rows, path, "image_column", asked.image or only, _holds_images)}
    if needs_captions:
        known = next((name for name in CAPTION_COLUMNS if name in rows.features), CAPTION_COLUMNS[0])
        chosen["text"] = _column(rows, path, "caption_column", asked.caption or known, _holds_text)
    if asked.mask is not None:
        chosen["mask"] = _column(rows, path, "mask_column", asked.mask, _holds_images)
    # Data saved to disk may carry a format (torch, numpy): remove it.
    rows = rows.with_format(None).select_columns(list(chosen.values()))
    for name in (chosen[key] for key in ("image", "mask") if key in chosen):
        if isinstance(rows.features[name], hf.Image):
            rows = rows.cast_column(name, hf.Image(decode=False))
    try:
        rows.data.validate(full=True)  # offsets that lead out of a buffer would end the process
    except pa.ArrowException as error:
        raise UserError(f"{path} is damaged: {one_line(error)[:300]}; get it again") from error
    return rows.rename_columns({old: new for new, old in chosen.items() if old != new})


def _column(rows: hf.Dataset, path: str, option: str, name: str, fits: Callable[[Any], bool]) -> str:
    columns = ", ".join(rows.features)
    require(name in rows.features, f"{path} has no column '{name}'; it has {columns}; set --cfg-options {option}=NAME")
    got, expected = rows.features[name], "text, or lists of texts" if option == "caption_column" else "images"
    message = (
        f"column '{name}' of {path} holds {got}; expected {expected}; it has {columns}; set --cfg-options {option}=NAME"
    )
    require(fits(got), message)
    return name


def _holds_images(feature: Any) -> bool:
    """Whether a column holds images as `datasets` stores them, or encoded bytes, bare or in a struct with a path."""
    if isinstance(feature, dict):
        path = feature.get("path", hf.Value("string"))
        holds = _holds_images(feature.get("bytes")) or feature.get("bytes") == hf.Value("null")  # null: paths alone
        return holds and isinstance(path, hf.Value) and "string" in path.dtype
    return isinstance(feature, hf.Image) or (isinstance(feature, hf.Value) and feature.dtype.endswith("binary"))


def _holds_text(feature: Any) -> bool:
    if isinstance(feature, hf.List | hf.LargeList):
        feature = feature.feature
    return isinstance(feature, hf.Value) and "string" in feature.dtype
