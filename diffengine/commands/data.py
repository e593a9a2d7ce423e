"""Look at images and their captions before training: what stops it, what hurts, and what they are."""

import argparse
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffengine import config
from diffengine.errors import UserError, require
from diffengine.terminal import say
from diffengine.text import printable

if TYPE_CHECKING:
    from PIL import Image

    from diffengine.api import RoundTrip
    from diffengine.datasets.findings import Findings, ImageFacts
    from diffengine.models.base import TrainableModel

DEFAULT = "amused_512_own"  # says how images are read and cropped if no config is named
COLUMNS = 80
SIDE = 240  # pixels of an image on the page
MOST_KEPT = 2000  # data sets of more images keep a sample of them for the page
MOST_SHOWN = 240  # images on the page
MOST_GROUPS = 40  # groups of duplicates on it


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", help="images: a folder, an image, a parquet file or a hub name")
    add("--config", metavar="NAME", help="the config to train: its resolution, captions, and what its model loses")
    add("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as of train")
    add("-o", "--output", metavar="FILE", help="also write a page with images: an .html file")


def run(options: argparse.Namespace) -> int:
    file = None if options.output is None else Path(options.output)
    html = file is None or (file.suffix in (".html", ".htm") and not file.is_dir())
    require(html, f"--output got '{file}'; expected a file name that ends in .html")

    from diffengine.datasets.findings import spread
    from diffengine.datasets.inspect import inspect, opened_section, shapes_of

    resolved = _resolved(options)
    loader = resolved["train_dataloader"]
    dataset, problems = opened_section(loader)
    model, note = _model(options, resolved, dataset if not problems.count else None)
    shapes = shapes_of(loader, model and model.size_multiple)
    kept = set(range(len(dataset)) if len(dataset) <= MOST_KEPT else spread(len(dataset), MOST_SHOWN))
    images: dict[int, bytes] = {}

    def keep(index: int, image: "Image.Image") -> None:
        if index in kept:
            images[index] = _webp(image)

    how: dict[str, Any] = {"side": SIDE, "each": keep} if file else {}
    findings = inspect(dataset, shapes, model and model.caption_lengths, seconds=None, most=None, **how)
    trips = _round_trips(model, dataset, shapes)
    if not loader.get("skip_unreadable"):
        for image in findings.unreadable:
            problems.add("images that cannot be read", image.problem or "")
    say(*screen(options.source, problems.lines, findings, trips, note))
    if file:
        from diffengine.report import write_data_page

        try:
            write_data_page(_page(options.source, problems.lines, findings, images, trips, note), file)
        except FileNotFoundError as error:
            raise UserError(f"cannot write '{file}': {error.strerror}; make its folder first") from error
        say(f"wrote {file}")
    return 2 if problems.count else 0


def _resolved(options: argparse.Namespace) -> config.Plain:
    """The config that says how the source is read. Without one named, no torch is imported."""
    settings, name = {"data": options.source}, options.config or DEFAULT
    if options.config is None and not options.cfg_options:
        return config.unchecked(name, [], settings)

    from diffengine.engine.build import load_config

    return load_config(name, options.cfg_options, settings)[1]


def _model(options: argparse.Namespace, resolved: config.Plain, dataset: Any) -> tuple["TrainableModel | None", str]:
    """The config's model, or None and why there is none."""
    if options.config is None:
        return None, f"for tokens, name a config, such as --config {DEFAULT}"
    if dataset is None:
        return None, "the model is loaded once the captions can be read"

    from diffengine.api import data_model

    try:
        return data_model(resolved, dataset), ""
    except UserError as error:
        return None, f"the model of {options.config} cannot be loaded: {error}"


def _round_trips(model: "TrainableModel | None", dataset: Any, shapes: Any) -> list["RoundTrip"]:
    if model is None:
        return []

    from diffengine.api import round_trips

    return round_trips(model, dataset, shapes)


def screen(
    source: str, problems: Sequence[str], findings: "Findings", trips: Sequence["RoundTrip"], note: str
) -> list[str]:
    """One screen of 80 columns, the worst first."""
    warnings = _warnings(findings, problems)
    verdict = f"{len(problems)} things stop training" if problems else "nothing stops training"
    lines = _wrapped(printable(f"{source}: {verdict}, {len(warnings)} may hurt"), "")
    for title, items in (("STOPS TRAINING", problems), ("MAY HURT", warnings)):
        if items:
            lines += ["", title, *(line for item in items for line in _wrapped(printable(item), "- "))]
    pairs = dict(findings.facts()["pairs"])
    if trips:
        worst = min(trip.psnr for trip in trips)
        pairs["round trip"] = f"PSNR {sum(trip.psnr for trip in trips) / len(trips):.1f} dB of {len(trips)} images, "
        pairs["round trip"] += f"the worst {worst:.1f}; what it loses cannot be learnt"
    width = max(map(len, pairs))
    lines += [""]
    lines += [line for name, text in pairs.items() for line in _wrapped(printable(text), f"{name:{width}}  ")]
    return [*lines, *(["", *_wrapped(printable(note), "")] if note else [])]


def _warnings(findings: "Findings", problems: Sequence[str]) -> list[str]:
    """What is not already among the problems."""
    lines = findings.warnings(near=True)
    return lines[1:] if problems and findings.unreadable else lines


def _wrapped(text: str, first: str) -> list[str]:
    indent = " " * len(first)
    return textwrap.wrap(text, COLUMNS, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False) or [
        first
    ]


def _webp(image: "Image.Image") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=72, method=2)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------- the page


def _page(
    source: str, problems: Sequence[str], findings: "Findings", images: dict[int, bytes], trips: Sequence["RoundTrip"],
    note: str,
) -> dict[str, Any]:  # fmt: skip
    """The data of the page, images as bytes."""
    notes = _notes(findings)
    shown = sorted(images, key=lambda index: (index not in notes, index))[:MOST_SHOWN]
    known = {image.index: image for image in findings.images}
    groups = [("equal files", group) for group in findings.duplicates]
    groups += [("look alike", group) for group in findings.near_duplicates]
    return {
        "name": source,
        "summary": findings.summary,
        "problems": list(problems),
        "warnings": _warnings(findings, problems),
        "note": note,
        **findings.facts(),
        "images": [_shown(findings, known[index], images[index], notes.get(index, [])) for index in sorted(shown)],
        "groups": [
            {"why": why, "images": [_shown(findings, image, images.get(image.index), []) for image in group[:8]]}
            for why, group in groups[:MOST_GROUPS]
        ],
        "captions": _captions(findings),
        "trips": [
            {
                "name": findings.short(trip.name),
                "psnr": trip.psnr,
                "image": _webp(trip.image),
                "again": _webp(trip.again),
            }
            for trip in trips
        ],
    }


def _notes(findings: "Findings") -> dict[int, list[str]]:
    """What is odd about which image."""
    notes: dict[int, list[str]] = {}
    for index in findings.empty:
        notes.setdefault(index, []).append("empty caption")
    for image in findings.enlarged:
        if image.size and findings.shapes:
            notes.setdefault(image.index, []).append(f"enlarged {findings.shapes.scale(image.size):.2g} times")
    for what, groups in (("copy", findings.duplicates), ("looks like another", findings.near_duplicates)):
        for image in (image for group in groups for image in group):
            notes.setdefault(image.index, []).append(what)
    return notes


def _shown(findings: "Findings", image: "ImageFacts", content: bytes | None, notes: Sequence[str]) -> dict[str, Any]:
    """An image of the page; `frames` are the shares of its width and height that a crop from its centre keeps."""
    frames = {}
    if image.size and findings.shapes:
        for name, shapes in (("kept", findings.shapes), ("square", findings.shapes.square)):
            ratio = image.size[0] / image.size[1] / (shapes.of(image.size)[0] / shapes.of(image.size)[1])
            frames[name] = [min(1.0, 1 / ratio), min(1.0, ratio)]
    texts = findings.captions[image.index] if findings.captions else []
    return {
        "name": findings.short(image.name),
        "image": content,
        "size": f"{image.size[0]}×{image.size[1]}" if image.size else "",
        "caption": " / ".join(texts),
        "frames": frames,
        "notes": list(notes),
    }


def _captions(findings: "Findings") -> list[list[str]]:
    """[what, caption] of captions that are cut or repeated."""
    rows = [[f"{tokens} tokens", text[:400]] for text, tokens in findings.cut[:10]]
    return rows + [[f"{count} images", text[:400]] for text, count in list(findings.repeated.items())[:10]]
