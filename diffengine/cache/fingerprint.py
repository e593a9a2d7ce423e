"""Digests of what a cache was made from: images, captions, settings."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from diffengine.cache.checked import digest_of, read_json, write_json
from diffengine.datasets import ImageDataset, UnreadableImage
from diffengine.errors import UserError

FileNote = list[Any]  # path, size in bytes, modification time in nanoseconds, digest


def digest_of_texts(texts: Iterable[list[str]]) -> str:
    """A digest of lists of texts, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for item in texts:
        encoded = [text.encode() for text in item]
        for number in (len(encoded), *map(len, encoded)):
            digest.update(number.to_bytes(8, "little"))
        digest.update(b"".join(encoded))
    return digest.hexdigest()


def digest_of_images(dataset: ImageDataset, notes: Path) -> str:
    """A digest of the bytes of a data set's images, in order; without `files()`, of their pixels.

    Files whose path, size and time an earlier call noted in the JSON file `notes` are not read again.
    """
    files = dataset.files()
    if files is None:
        return digest_of_texts([_pixels(dataset, index)] for index in range(len(dataset)))
    known: dict[str, FileNote] = {note[0]: note for note in read_json(notes)[0] or []}
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        noted = list(pool.map(lambda file: _note(file, known.get(str(file))), files))
    if {note[0]: note for note in noted} != known:
        with suppress(OSError):  # they only save time, and a complete cache may be in a read-only folder
            write_json(notes, noted)
    return digest_of([note[3] for note in noted])


def _pixels(dataset: ImageDataset, index: int) -> str:
    try:
        sample = dataset[index]
    except UnreadableImage:  # the stream reports it
        return "unreadable"
    arrays = [np.asarray(sample[key]) for key in ("image", "mask") if key in sample]
    digests = (hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest() for pixels in arrays)
    return " ".join(f"{pixels.shape} {digest}" for pixels, digest in zip(arrays, digests))


def _note(file: Path, known: FileNote | None) -> FileNote:
    try:
        info = file.stat()
        if known is not None and known[1:3] == [info.st_size, info.st_mtime_ns]:
            return known
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read '{file}': {error.strerror}") from error
    return [str(file), info.st_size, info.st_mtime_ns, digest]


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Why a table with the fingerprint `before` has to be built again; None if it need not be."""
    names = [name for name in {**now, **before} if json.dumps(before.get(name)) != json.dumps(now.get(name))]
    return f"changed since it was built: {', '.join(names)}" if names else None
