"""A folder of images with captions and masks in files, as a list of rows."""

import csv
import io
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from diffengine.errors import Mistakes, UserError, require
from diffengine.files import read_foreign
from diffengine.text import can_be_written, one_line

IMAGE_ENDINGS = {
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg",
    ".jpg", ".jxl", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
MASK_ENDING = ".mask.png"  # of the mask of an image: NAME.jpg has NAME.mask.png
CAPTION_COLUMNS = ("text", "caption", "prompt")  # tried in this order
LARGEST_METADATA, LARGEST_TEXT = 2**30, 2**20  # bytes of a metadata file and of a NAME.txt
LONGEST_CAPTION = 2**16  # characters; no model reads so many

Caption = str | list[str]
Record = tuple[int, dict[str, Any]]  # the line number in a metadata file, its values by column
SHOWN = 5  # problems of each sort


class Row(NamedTuple):
    """Paths of an image and its mask, and its caption or captions."""

    image: str
    caption: Caption
    mask: str | None = None


class Columns(NamedTuple):
    """The columns of metadata, as asked for."""

    image: str | None = None
    caption: str | None = None
    mask: str | None = None


class UnusableData(Mistakes):
    """All that is wrong with a data set. `images` are its image files, whose content is not yet checked."""

    def __init__(self, data: str, found: "Problems", images: Sequence[Path] = ()) -> None:
        super().__init__(f"{data} has {found.count} problems", found.lines)
        self.data, self.found, self.images = data, found, list(images)

    def __str__(self) -> str:
        return self.problems[0] if self.found.count == 1 else super().__str__()

    @property
    def lines(self) -> list[str]:
        return [str(self)] if self.found.count == 1 else super().lines


class Problems:
    """What is wrong with a data set, collected to be reported at once: of each sort the first few and how many more."""

    def __init__(self) -> None:
        self._by_sort: dict[str, list[str]] = {}

    def add(self, sort: str, problem: str) -> None:
        """`sort` is a plural: "rows of metadata.csv"."""
        self._by_sort.setdefault(sort, []).append(problem)

    def extend(self, other: "Problems", label: str) -> None:
        """Add another data set's, each after its label."""
        for sort, problems in other._by_sort.items():
            for problem in problems:
                self.add(sort, f"{label}: {problem}")

    @contextmanager
    def collected(self, sort: str) -> Iterator[None]:
        """Inside, a UserError ends the block and is added."""
        try:
            yield
        except UserError as error:
            self.add(sort, str(error))

    def raise_all(self, data: str, images: Sequence[Path] = ()) -> None:
        """Raise an UnusableData if anything is wrong."""
        if self._by_sort:
            raise UnusableData(data, self, images)

    @property
    def count(self) -> int:
        return sum(map(len, self._by_sort.values()))

    @property
    def lines(self) -> list[str]:
        found: list[str] = []
        for sort, problems in self._by_sort.items():
            found += problems[:SHOWN]
            if len(problems) > SHOWN:
                found.append(f"and {len(problems) - SHOWN:,} more {sort}")
        return found


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
    """Whether a file is named as an image is, and not as the mask of one."""
    return file.suffix.lower() in IMAGE_ENDINGS and not _is_mask(file)


def _is_mask(file: Path) -> bool:
    return file.name.lower().endswith(MASK_ENDING)


def read_folder(
    root: Path, files: list[Path], columns: Columns,
    caption: str | None, captions_from_file_names: bool, allow_outside: bool,
) -> list[Row]:  # fmt: skip
    """The images among `files` (all files of `root`) with their captions and masks, sorted by path.

    Captions come from, in this order: `caption`, one for all; the file names, if asked; metadata files, if there are
    any; else a NAME.txt per image, with a caption per line. An image with several metadata rows appears once per row.
    Metadata may name images outside of `root` only with `allow_outside`. The mask of an image is NAME.mask.png next to
    it or, if metadata has a column of masks, what that says.

    Raises:
        UnusableData: all that is wrong but the images' content.
    """
    images = [file for file in files if is_image(file)]
    metadata = [file for file in files if file.name in METADATA_NAMES]
    require(bool(images), f"no images in {root}; expected files that end in {', '.join(sorted(IMAGE_ENDINGS))}")
    by_metadata = bool(metadata) and caption is None and not captions_from_file_names
    column = columns.caption or columns.image or columns.mask
    message = f"got column '{column}', but the captions of {root} come from no metadata.csv or .jsonl; unset the column"
    require(not column or by_metadata, message)
    problems = Problems()
    for file in images:
        if not can_be_written(str(file)):
            problems.add("names", f"the name of {str(file)!r} is not UTF-8; rename the file")
    if caption is None and not captions_from_file_names:
        if by_metadata:
            rows, captioned = _from_metadata(metadata, columns, None if allow_outside else root, problems)
        else:
            rows, captioned = _from_text_files(root, images, problems)
        missing = [file for file in images if captioned is not None and os.path.normpath(file) not in captioned]
        if missing:
            names, more = (str(file.relative_to(root)) for file in missing[:SHOWN]), len(missing) - SHOWN
            problems.add(
                "images without a caption",
                f"{len(missing)} of {len(images)} images in {root} have no caption: {', '.join(names)}"
                f"{f' and {more:,} more' if more > 0 else ''}; give each "
                f"{'a row in the metadata' if by_metadata else 'a NAME.txt'}, or remove it",
            )
    elif caption is not None:
        rows = [Row(str(file), caption) for file in images]
    else:
        rows = [Row(str(file), caption_of_name(file)) for file in images]
    if columns.mask is None:
        rows = [row._replace(mask=_mask_of(row.image)) for row in rows]
        captioned = {mask for file in images if (mask := _mask_of(str(file)))}
    if captioned is not None:
        _check_masks(files, captioned, columns.mask, problems)
    problems.raise_all(str(root), images)
    return rows


def _mask_of(image: str) -> str | None:
    mask = os.path.splitext(image)[0] + MASK_ENDING
    return os.path.normpath(mask) if os.path.isfile(mask) else None


def _check_masks(files: list[Path], known: set[str], column: str | None, problems: Problems) -> None:
    """Note masks that are not among the known ones, which belong to images."""
    where = f" or the path in column '{column}'" if column else ""
    for file in files:
        if _is_mask(file) and os.path.normpath(file) not in known:
            lonely = f"{file} is no mask of an image here; expected the image next to it, as NAME.jpg for"
            problems.add("masks", f"{lonely} NAME{MASK_ENDING}{where}; rename or remove it")


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


def _from_text_files(root: Path, images: list[Path], problems: Problems) -> tuple[list[Row], set[str] | None]:
    """Rows, and which images have a caption, whatever is wrong with it."""
    texts = {file: file.with_suffix(".txt") for file in images if file.with_suffix(".txt").is_file()}
    if not texts:
        problems.add(
            "folders without captions",
            f"no captions in {root}; expected metadata.csv or metadata.jsonl (columns file_name, text) or a NAME.txt "
            "per image, or set --cfg-options captions_from_file_names=True",
        )
        return [], None
    rows: list[Row] = []
    for file, text in texts.items():
        with problems.collected("text files"):
            rows.append(Row(str(file), _captions_in(text)))
    return rows, {os.path.normpath(file) for file in texts}


def _captions_in(file: Path) -> Caption:
    """The caption of a NAME.txt, "" if it is blank; of several lines, a caption each."""
    captions = [line.strip() for line in read_text(file).split("\n") if line.strip()]
    return captions if len(captions) > 1 else "".join(captions)


def _from_metadata(
    metadata: list[Path], asked: Columns, inside: Path | None, problems: Problems
) -> tuple[list[Row], set[str] | None]:
    """Rows, and which images are named, whatever is wrong with their captions; None if a whole file is of no use."""
    rows: list[Row] = []
    image_column = asked.image or "file_name"
    named: set[str] | None = set()
    for file in metadata:
        before, records = problems.count, list[Record]()
        with problems.collected("metadata files"):
            both = file.name == METADATA_NAMES[0] and file.with_name(METADATA_NAMES[1]) in metadata
            require(not both, f"{file.parent} holds both {' and '.join(METADATA_NAMES)}; keep one of them")
            read = (
                _csv_records(file, image_column, problems) if file.suffix == ".csv" else _json_records(file, problems)
            )
            if read or problems.count == before:
                columns = _columns_in(file, read, asked._replace(image=image_column))
                records = read
        if problems.count > before:  # a line that cannot be read may have named any image
            named = None
        for line, record in records:
            if named is not None:
                for name in (record.get(image_column), record.get(asked.mask or "")):
                    named.add(os.path.normpath(file.parent / str(name)))
            with problems.collected(f"rows of {file}"):
                rows.append(_row(file, line, record, columns, inside))
    return sorted(rows, key=lambda row: Path(row.image)), named


def _columns_in(file: Path, records: list[Record], asked: Columns) -> Columns:
    """The columns to read; a UserError if the file lacks one."""
    columns = list(dict.fromkeys(key for _, record in records for key in record if key is not None))
    known = next((name for name in CAPTION_COLUMNS if name in columns), CAPTION_COLUMNS[0])
    taken = asked._replace(caption=asked.caption or known)
    for name, option in zip(taken, ("image_column", "caption_column", "mask_column")):
        has, advice = ", ".join(columns) or "no rows", f"set --cfg-options {option}=NAME"
        require(name is None or name in columns, f"{file} has no column '{name}'; it has {has}; {advice}")
    return taken


def _csv_records(file: Path, image_column: str, problems: Problems) -> list[Record]:
    """The rows of a CSV file whose fields are separated by a comma, a semicolon or a tab."""
    text = read_text(file, LARGEST_METADATA)
    first = text.partition("\n")[0]
    separators = (char for char in ",;\t" if image_column in [name.strip('"') for name in first.split(char)])
    reader = csv.DictReader(io.StringIO(text), strict=True, delimiter=next(separators, ","))
    records: list[Record] = []
    try:
        for record in reader:
            records.append((reader.line_num, record))
            if None in record:  # csv's key for the fields beyond the header
                advice = "has more fields than the first line; quote texts with commas"
                problems.add(f"rows of {file}", f"{file}, line {reader.line_num} {advice}")
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.reader.line_num} is not CSV: {error}") from error
    return records


def _json_records(file: Path, problems: Problems) -> list[Record]:
    records: list[Record] = []
    for line, content in enumerate(read_text(file, LARGEST_METADATA).split("\n"), start=1):
        if content.strip():
            with problems.collected(f"rows of {file}"):
                records.append((line, _json_record(f"{file}, line {line}", content)))
    return records


def _json_record(row: str, content: str) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, or nested as deeply
        reason = getattr(error, "msg", None) or one_line(error)
        raise UserError(f"{row} is not JSON: {reason}; write one object a line") from error
    require(isinstance(record, dict), f"{row} got {content[:40]!r}; expected an object, one a line")
    return record


def _row(file: Path, line: int, record: dict[str, Any], columns: Columns, inside: Path | None) -> Row:
    row, caption_column = f"{file}, line {line}", columns.caption or ""
    caption, mask = record.get(caption_column), record.get(columns.mask or "") or None  # a CSV has "" for none
    image = _path_of(record.get(columns.image or ""), file, f"{row} names the image")
    mask = mask and _path_of(mask, file, f"{row} names the mask")
    texts: list[Any] = caption if isinstance(caption, list) else [caption]
    valid = bool(texts) and all(isinstance(text, str) for text in texts)
    got = f"{row}: '{caption_column}' got {repr(caption)[:200]}"
    require(valid, f"{got}; expected a text, empty for none, or a list of texts")
    for problem in filter(None, map(problem_of_caption, texts)):
        raise UserError(f"{row}: '{caption_column}' {problem}; change it")
    if inside is not None:
        check_inside([inside], filter(None, (image, mask)))
    return Row(image, texts if isinstance(caption, list) else texts[0], mask)


def _path_of(name: Any, file: Path, named: str) -> str:
    """The path of a file that a metadata file names."""
    exists = isinstance(name, str) and os.path.isfile(file.parent / name)
    require(exists, f"{named} {repr(name)[:200]}, which does not exist; expected a path relative to this file")
    return os.path.normpath(file.parent / name)
