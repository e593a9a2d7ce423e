"""The page itself: one HTML file with everything in it, which sends no request."""

import base64
import io
import json
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from diffengine import __version__
from diffengine.files import write_text
from diffengine.report.read import COUNT, RunFiles, differences, read_run
from diffengine.signatures import children, fits

STATIC = Path(__file__).parent / "static"
IMAGE_BYTES = 2_300_000  # of all images together, as text
MOST_IMAGES = 480
SOURCE = {"name": str, "path": str, "images": COUNT, "trained": COUNT, "repeats": int | str, "samples": COUNT,
          "weight": float}  # fmt: skip
LEVELS = ((256, 80), (192, 75), (128, 70), (96, 60), (64, 50))  # side and quality of smaller copies, best first
MIME = {".webp": "image/webp", ".png": "image/png"}
FORMATS = ("WEBP", "PNG")  # that a run writes


def write_page(folders: Sequence[str | Path], file: Path, status: str | None = None) -> Path:
    """Write the page of one run, or of several side by side, and return its path.

    Args:
        folders: work dirs.
        status: of the first run, if whoever calls knows better than its files.

    Raises:
        UserError: a folder holds no run.
    """
    write_text(file, build_page([read_run(folder) for folder in folders], status))
    return file


def build_page(runs: Sequence[RunFiles], status: str | None = None) -> str:
    """The HTML of these runs."""
    data: dict[str, Any] = {
        "version": __version__,
        "written": time.time(),
        "runs": [describe(run, IMAGE_BYTES // len(runs)) for run in runs],
        "differences": differences(list(runs)) if len(runs) > 1 else [],
    }
    if status:
        data["runs"][0]["status"] = status
    names = " and ".join(run.name for run in runs)
    return fill(names, "curves", static("page.js"), data, static("uPlot.min.css"), static("uPlot.iife.min.js"))


def fill(name: str, first: str, script: str, data: Any, styles: str = "", libraries: str = "") -> str:
    """The page's template with a title, the id of its first section, and what builds it from `data`."""
    texts = {
        "title": escape(f"{name} · diffengine"),
        "first": first,
        "styles": styles + static("page.css"),
        "libraries": libraries,
        "script": static("elements.js") + script,
        "data": embed(data),
    }
    page = static("page.html")
    before, *rest = page.split("{{")  # once, so that braces in the data are never looked at
    return before + "".join(texts[name] + text for name, _, text in (item.partition("}}") for item in rest))


def embed(data: Any) -> str:
    """JSON that is safe inside a script element: no `<` can end it, and no value can start another element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be written


def describe(run: RunFiles, image_bytes: int) -> dict[str, Any]:
    """All that the page shows of a run, with images as data URIs of at most about `image_bytes` together."""
    facts = run.facts
    data = dict(facts.get("data") or {})
    thumbnails = [item for _, item in children(data.pop("thumbnails", None)) if isinstance(item, dict)]
    rows = [row for _, row in children(data.pop("sources", None)) if _is_source(row)]
    data |= {"sources": rows} if rows else {}
    files = [run.folder / "report" / Path(str(item.get("file"))).name for item in thumbnails]
    images = fit(files, image_bytes // 8)
    data["thumbnails"] = [
        {"caption": str(item.get("caption", "")), "image": image} for item, image in zip(thumbnails, images) if image
    ]
    return {
        "name": run.name,
        "folder": str(run.folder),
        "status": run.status,
        "step": run.step,
        "max_iters": run.max_iters,
        "seconds_left": run.seconds_left,
        **{key: facts.get(key) for key in ("started", "updated", "seconds", "error")},
        "references": facts.get("references") or {},
        "warnings": run.warnings,
        "environment": facts.get("environment") or {},
        "memory": facts.get("memory") or {},
        "data": data,
        "commands": run.commands,
        "config": run.config_rows(),
        "train": run.columns(""),
        "val": run.columns("val/"),
        "previews": previews(run, image_bytes * 7 // 8),
    }


def _is_source(row: Any) -> bool:
    """Whether a row of a run's sources has what the page shows."""
    return isinstance(row, dict) and all(fits(row.get(key), hint) for key, hint in SOURCE.items())


def previews(run: RunFiles, image_bytes: int) -> dict[str, Any]:
    """{"steps", "prompts", "images" by step and prompt, "original", "round_trip", "process" of the newest step}."""
    known, steps = run.prompts, run.preview_steps
    labels, process = known["prompts"], known["steps"]
    single = bool(labels) and all(run.preview_files(step) for step in steps)
    count = len(labels) if single else 1
    steps = spread_steps(steps, MOST_IMAGES // count)
    if single:
        shown = [run.preview_files(step)[:count] for step in steps]
        sources = {name: run.source_files(name)[:count] for name in ("original", "round_trip")}
        last = run.preview_files(steps[-1])[count : count + len(process)] if steps else []
    else:
        labels, process, last = ["all previews"], [], []
        shown, sources = [[run.grid_file(step)] for step in steps], {}
    files = [file for group in (*shown, *sources.values(), last) for file in group]
    uris = dict(zip(files, fit(files, image_bytes, () if single else ((1024, 75), (768, 65), (512, 55)))))
    return {
        "steps": steps,
        "prompts": labels,
        "grid": not single,
        "images": [[uris[file] for file in group] for group in shown],
        **{name: [uris[file] for file in group] for name, group in sources.items()},
        "process": [{"label": label, "image": uris[file]} for label, file in zip(process, last)],
    }


def spread_steps(steps: list[int], most: int) -> list[int]:
    """At most so many steps, evenly spaced, with the first and the last."""
    most = max(2, most)
    if len(steps) <= most:
        return steps
    return [steps[index * (len(steps) - 1) // (most - 1)] for index in range(most)]


def fit(files: Sequence[Path], most_bytes: int, levels: Sequence[tuple[int, int]] = ()) -> list[str]:
    """Images as data URIs: as they are, or as smaller copies if together they would take more bytes than that.

    An image that cannot be read becomes "".
    """
    sizes = [file.stat().st_size if file.is_file() else 0 for file in files]
    if _as_text(sum(sizes)) <= most_bytes:
        pairs = zip(files, sizes)
        return [as_uri(file.read_bytes(), MIME.get(file.suffix, "image/webp")) if size else "" for file, size in pairs]
    levels = levels or LEVELS
    opened = [_open(file, levels[0][0]) for file in files]
    probe = opened[:: max(1, len(opened) // 8)]
    encoded: list[bytes] = []
    for side, quality in levels:
        expected = sum(len(_encode(image, side, quality)) for image in probe) * len(opened) / len(probe)
        if _as_text(expected) > 1.2 * most_bytes and (side, quality) != levels[-1]:
            continue  # no need to encode them all
        encoded = [_encode(image, side, quality) for image in opened]
        if _as_text(sum(map(len, encoded))) <= most_bytes:
            break
    return [as_uri(data, "image/webp") if data else "" for data in encoded]


def _as_text(size: float) -> float:
    """The characters that so many bytes take."""
    return size * 4 / 3


def _open(file: Path, side: int) -> Image.Image | None:
    try:
        with Image.open(file, formats=FORMATS) as image:
            small = image.convert("RGB")
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        return small
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def _encode(image: Image.Image | None, side: int, quality: int) -> bytes:
    if image is None:
        return b""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=quality, method=2)
    return buffer.getvalue()


def as_uri(data: bytes, mime: str) -> str:
    """Bytes as a data URI."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def static(name: str) -> str:
    """The text of a file in `static`."""
    return (STATIC / name).read_text(encoding="utf-8")
