"""The page of a data set, before training."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffengine import __version__
from diffengine.files import write_text
from diffengine.report.page import as_uri, fill, static


def write_data_page(data: Mapping[str, Any], file: Path) -> None:
    """Write what `diffengine data` found, with images as bytes of WebP, as one HTML file that sends no request."""
    plain = {"version": __version__, "written": time.time(), **_embedded(data)}
    write_text(file, fill(str(data["name"]), "images", static("data.js"), plain))


def _embedded(value: Any) -> Any:
    """Images as data URIs; all else as it was."""
    if isinstance(value, bytes):
        return as_uri(value, "image/webp")
    if isinstance(value, Mapping):
        return {key: _embedded(item) for key, item in value.items()}
    return [_embedded(item) for item in value] if isinstance(value, list | tuple) else value
