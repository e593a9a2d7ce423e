"""A folder of images with captions in files, as a list of (image file, caption)."""

import csv
import io
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from diffengine.errors import UserError, require
from diffengine.files import read_foreign
from diffengine.text import can_be_written, one_line

IMAGE_ENDINGS = {
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg",
    ".jpg", ".jxl", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
CAPTION_COLUMNS = ("text", "caption", "prompt")  # tried in this order
LARGEST_METADATA, LARGEST_TEXT = 2**30, 2**20  # bytes of a metadata file and of a NAME.txt
LONGEST_CAPTION = 2**16  # characters; no model reads so many

Caption = str | list[str]
Row = tuple[str, Caption]  # the image's path, its caption or captions
Record = tuple[int, dict[str, Any]]  # the line number in a metadata file, its values by column


def list_files(root: Path) -> list[Path]:
    """Every file below `root`, sorted by path; links are followed, names that start with . or __MACOSX skipped."""
    files = []
    visited = set()
    for folder, subfolders, names in os.walk(root, onerror=_refuse, followlinks=True):
        if os.path.realpath(folder) in visited:
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(files)


def is_image(file: Path) -> bool:
    """Whether a file is named as an image is."""
    return file.suffix.lower() in IMAGE_ENDINGS


def read_folder(
    root: Path, files: list[Path], image_column: str | None, caption_column: str | None,
    caption: str | None, captions_from_file_names: bool, allow_outside: bool,
) -> list[Row]:  # fmt: skip
    """The images among `files` (all files of `root`) with their captions, sorted by path.

    Captions come from, in this order: `caption`, one for all; the file names, if asked; metadata files, if there are
    any; else a NAME.txt per image, with a caption per line. An image with several metadata rows appears once per row.
    Metadata may name images outside of `root` only with `allow_outside`.
    """
    images = [file for file in files if is_image(file)]
    metadata = [file for file in files if file.name in METADATA_NAMES]
    require(bool(images), f"no images in {root}; expected files that end in {', '.join(sorted(IMAGE_ENDINGS))}")
    by_metadata = bool(metadata) and caption is None and not captions_from_file_names
    column = caption_column or image_column
    message = f"got column '{column}', but the captions of {root} come from no metadata.csv or .jsonl; unset the column"
    require(not column or by_metadata, message)
    for file in images:
        require(can_be_written(str(file)), f"the name of {str(file)!r} is not UTF-8; rename the file")
    if caption is not None:
        return [(str(file), caption) for file in images]
    if captions_from_file_names:
        return [(str(file), caption_of_name(file)) for file in images]
    if by_metadata:
        rows = _from_metadata(metadata, image_column or "file_name", caption_column)
        if not allow_outside:
            check_inside([root], (name for name, _ in rows))
    else:
        rows = _from_text_files(root, images)
    captioned = {os.path.normpath(name) for name, _ in rows}
    missing = [file for file in images if os.path.normpath(file) not in captioned]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(images)} images in {root} have no caption, the first is {missing[0]}; give each "
            f"{'a row in the metadata' if by_metadata else 'a NAME.txt'}, or remove it"
        )
    return rows


def caption_of_name(file: Path) -> str:
    """red_fox.jpg -> "red fox". Letters are composed (NFC), since macOS stores names decomposed."""
    return " ".join(unicodedata.normalize("NFC", file.stem).replace("_", " ").split())


def check_inside(folders: Sequence[Path], names: Iterable[str]) -> None:
    """Raise a UserError if a path leads out of the data's folders by its name.

    A link inside is followed: whoever put it there chose where it leads.
    """
    tops = tuple(os.path.join(os.path.abspath(folder), "") for folder in folders)
    for name in names:
        outside = f"the data names the image '{name}' outside of its folder '{folders[0]}'"
        require(
            os.path.abspath(name).startswith(tops),
            f"{outside}; move it inside, or set --cfg-options allow_outside=True",
        )


def problem_of_caption(text: str) -> str | None:
    """Why a text cannot be a caption; None if it can."""
    if len(text) > LONGEST_CAPTION:
        return f"has {len(text):,} characters; expected at most {LONGEST_CAPTION:,}"
    return None if can_be_written(text) else "holds NUL or characters that are not Unicode"


def read_text(file: Path, most: int = LARGEST_TEXT) -> str:
    """The UTF-8 text of a file of at most `most` bytes, without a byte order mark."""
    try:
        text = read_foreign(file, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    # Plain English in UTF-16 without a byte order mark is valid UTF-8, full of NUL.
    require("\0" not in text, f"{file} holds NUL characters, perhaps it is UTF-16; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} cannot be read: {error.strerror}; check its permissions") from error


def _from_text_files(root: Path, images: list[Path]) -> list[Row]:
    texts = {file: file.with_suffix(".txt") for file in images}
    rows: list[Row] = [(str(file), _captions_in(text)) for file, text in texts.items() if text.is_file()]
    if not rows:
        raise UserError(
            f"no captions in {root}; expected metadata.csv or metadata.jsonl (columns file_name, text) or a NAME.txt "
            "per image, or set --cfg-options captions_from_file_names=True"
        )
    return rows


def _captions_in(file: Path) -> Caption:
    """The caption of a NAME.txt, "" if it is blank; of several lines, a caption each."""
    captions = [line.strip() for line in read_text(file).split("\n") if line.strip()]
    return captions if len(captions) > 1 else "".join(captions)


def _from_metadata(metadata: list[Path], image_column: str, caption_column: str | None) -> list[Row]:
    rows: list[Row] = []
    for file in metadata:
        both = file.name == METADATA_NAMES[0] and file.with_name(METADATA_NAMES[1]) in metadata
        require(not both, f"{file.parent} holds both {' and '.join(METADATA_NAMES)}; keep one of them")
        records = list(_csv_records(file) if file.suffix == ".csv" else _json_records(file))
        columns = list(dict.fromkeys(key for _, record in records for key in record))
        column = caption_column or next((name for name in CAPTION_COLUMNS if name in columns), CAPTION_COLUMNS[0])
        for name, option in ((image_column, "image_column"), (column, "caption_column")):
            has = ", ".join(columns) or "no rows"
            require(name in columns, f"{file} has no column '{name}'; it has {has}; set --cfg-options {option}=NAME")
        rows += [_row(file, line, record, image_column, column) for line, record in records]
    return sorted(rows, key=lambda row: Path(row[0]))


def _csv_records(file: Path) -> Iterator[Record]:
    reader = csv.DictReader(io.StringIO(read_text(file, LARGEST_METADATA)), strict=True)
    try:
        for record in reader:
            # None is csv's key for the fields beyond the header.
            message = f"{file}, line {reader.line_num} has more fields than the first line; quote texts with commas"
            require(None not in record, message)
            yield reader.line_num, record
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.reader.line_num} is not CSV: {error}") from error


def _json_records(file: Path) -> Iterator[Record]:
    for line, content in enumerate(read_text(file, LARGEST_METADATA).split("\n"), start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, or nested as deeply
            reason = getattr(error, "msg", None) or one_line(error)
            raise UserError(f"{file}, line {line} is not JSON: {reason}; write one object a line") from error
        require(isinstance(record, dict), f"{file}, line {line} got {content[:40]!r}; expected an object, one a line")
        yield line, record


def _row(file: Path, line: int, record: dict[str, Any], image_column: str, caption_column: str) -> Row:
    row, caption = f"{file}, line {line}", record.get(caption_column)
    name: Any = record.get(image_column)
    exists = isinstance(name, str) and os.path.isfile(file.parent / name)
    named = f"{row} names the image {repr(name)[:200]}"
    require(exists, f"{named}, which does not exist; expected a path relative to this file")
    texts: list[Any] = caption if isinstance(caption, list) else [caption]
    valid = bool(texts) and all(isinstance(text, str) for text in texts)
    got = f"{row}: '{caption_column}' got {repr(caption)[:200]}"
    require(valid, f"{got}; expected a text, empty for none, or a list of texts")
    for problem in filter(None, map(problem_of_caption, texts)):
        raise UserError(f"{row}: '{caption_column}' {problem}; change it")
    return os.path.normpath(file.parent / name), texts if isinstance(caption, list) else texts[0]
