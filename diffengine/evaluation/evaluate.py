"""Generate an image per caption with each source and setting, and put what they are worth into one table."""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from diffengine.datasets import Sample, center_crop, spread
from diffengine.errors import UserError
from diffengine.evaluation.heldout import TIMES, fixed_images, held_out_losses
from diffengine.evaluation.retrieval import Gallery, rate
from diffengine.evaluation.scores import Score
from diffengine.files import check_regular, read_json, write_text
from diffengine.grids import grid, save_image
from diffengine.models.generation import GenerationOptions, ImageRequest, ImageSampler
from diffengine.terminal import Progress

IN_GRID, CELLS = 12, 8  # captions in the grid; images in one of its rows
SHOWN = ("guidance_scale", "num_inference_steps", "order")  # of the settings, in the table
LOSS_BATCH = 16  # images whose loss is computed at once
Row = dict[str, Any]
Samples = list[tuple[Sample, int]]


@dataclass(frozen=True)
class LossData:
    """Images to compute the loss on.

    Attributes:
        samples: held-out and trained samples after the image transforms, each with the digest of its content; for a
            model of images of so many pixels a side, divisible by so many.
        seed: of the masks; with a run's own seed the numbers are those of the run.
    """

    samples: Callable[[int, int], tuple[Samples, Samples]]
    seed: int = 0


@dataclass(frozen=True)
class EvalData:
    """Captions to generate from.

    Attributes:
        captions: N of them; one may occur several times.
        images: the data's image of each, at any size; None for prompts without images.
        groups: indices of captions by the name of a row in the table: {"unseen": [3, 7]}. None: one group, "all".
        others: further images, by caption, that a generated image must not be nearer to.
        loss: images to compute the loss on; None for prompts without images.
    """

    captions: Sequence[str]
    images: Sequence[Image.Image] | None = None
    groups: Mapping[str, Sequence[int]] | None = None
    others: Mapping[str, Image.Image] = field(default_factory=dict)
    loss: LossData | None = None

    def indices(self) -> Mapping[str, Sequence[int]]:
        """The indices of each group that has some."""
        groups = {name: indices for name, indices in (self.groups or {}).items() if indices}
        return groups or {"all": range(len(self.captions))}


@dataclass(frozen=True)
class Source:
    """A model to evaluate: its name in the table, how to open it, and what changes when its weights do."""

    name: str
    open: Callable[[], ImageSampler]
    fingerprint: str


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: a row per source, setting and group; one of losses per source; and lines about all."""

    folder: Path
    rows: list[Row]
    losses: list[Row]
    notes: list[str]
    images: dict[str, Sequence[Image.Image]]  # one per caption, by what made them

    def write(self, data: EvalData) -> None:
        """Write `eval.md`, `eval.json` and `eval.png`."""
        text = json.dumps({"notes": self.notes, "rows": self.rows, "losses": self.losses}, indent=2)
        write_text(self.folder / "eval.json", text + "\n")
        write_text(self.folder / "eval.md", self.markdown())
        _write_grid(self.folder / "eval.png", data, self.images)

    def markdown(self) -> str:
        """The notes and the tables, in Markdown."""
        tables = [_table(rows) for rows in (self.rows, self.losses) if rows]
        return "\n".join([*self.notes, "", *"\n\n".join(tables).splitlines(), ""])


def evaluate(
    sources: Sequence[Source], data: EvalData, settings: Sequence[GenerationOptions], folder: Path, *,
    per_caption: int = 1, seed: int = 0, side: int | None = None, scores: Sequence[Score] = (),
    notes: Sequence[str] = (),
) -> Evaluation:  # fmt: skip
    """Evaluate every source with every setting; write `eval.md`, `eval.json`, `eval.png` and all images into a folder.

    Started again, it goes on with the images that are missing: each is a file.

    Args:
        per_caption: images per caption; image i uses `seed + i`.
        side: of the images in pixels; None for each model's own.
        scores: to compute besides retrieval.
        notes: lines to begin with.
    """
    captions = [caption for caption in data.captions for _ in range(per_caption)]
    requests = [ImageRequest(caption, seed + index) for index, caption in enumerate(captions)]
    steps = sum(setting.num_inference_steps for setting in settings) / len(settings)
    progress = Progress(len(sources) * len(settings) * len(requests), "generated", "images", steps)
    found, digest = Evaluation(folder, [], [], [*notes], {}), _digest(data.captions)
    if data.images is not None:
        found.notes.append(f"chance {1 / len({*data.captions, *data.others}):.4f}")
    for source in sources:
        sampler, kept = source.open(), partial(_kept, folder / "images", source)
        for setting in settings:
            sampler.generate(requests, setting, _square(side))  # checks them all, and generates nothing yet
        label = f"{source.name}: " if len(sources) > 1 else ""
        gallery = _gallery(data, side or sampler.side)
        if gallery is not None:
            originals = gallery.images[: len(data.captions)]
            shown = {"data": _digest(image.tobytes() for image in originals)}
            round_trips, _ = kept("round trip", shown, len(originals), partial(_reconstruct, sampler, originals))
            found.notes.append(_ceiling(source, round_trips, gallery, data))
            found.images.update({"data": originals, f"{label}VQ round trip": round_trips})
        if data.loss is not None:
            found.losses.append({"source": source.name, **_losses(folder, source, sampler, data.loss)})
        for setting in settings:
            setting = setting.or_guided_by(sampler.guidance_scale)
            asked = {"prompts": digest, "seed": seed, "n": per_caption, "side": side, **asdict(setting)}
            with progress:
                generate = partial(_generate, sampler, requests, setting, side, progress)
                images, seconds = kept(_name(setting), asked, len(requests), generate)
            found.images[f"{label}{_name(setting)}"] = images[::per_caption]
            head = {"source": source.name, **{name: asdict(setting)[name] for name in SHOWN}}
            for row in _rows(images, gallery, data, per_caption, scores):
                found.rows.append({**head, **row, "seconds_per_image": seconds})
    found.write(data)
    return found


def _gallery(data: EvalData, side: int) -> Gallery | None:
    """The data's images as training sees them, then the others."""
    if data.images is None:
        return None
    images = [*data.images, *data.others.values()]
    return Gallery([*data.captions, *data.others], [center_crop(image, side) for image in images])


def _reconstruct(sampler: ImageSampler, images: Sequence[Image.Image], missing: Sequence[int]) -> Iterator[Image.Image]:
    return sampler.reconstruct([images[index] for index in missing])


def _generate(
    sampler: ImageSampler, requests: Sequence[ImageRequest], setting: GenerationOptions,
    side: int | None, progress: Progress, missing: Sequence[int],
) -> Iterator[Image.Image]:  # fmt: skip
    progress.skip((len(requests) - len(missing)) * setting.num_inference_steps)
    wanted = [requests[index] for index in missing]
    return sampler.generate(wanted, setting, _square(side), on_step=progress.advance)


def _square(side: int | None) -> tuple[int, int] | None:
    return None if side is None else (side, side)


def _kept(
    folder: Path, source: Source, name: str, asked: Mapping[str, Any], count: int,
    make: Callable[[Sequence[int]], Iterator[Image.Image]],
) -> tuple[list[Image.Image], float]:  # fmt: skip
    """`count` images, made where their file is missing; and the seconds that one took.

    What they were made from is written next to them; if that has changed, all are made again.
    """
    folder = folder / _slug(f"{source.name}-{name}")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"weights": source.fingerprint, **asked}, indent=2) + "\n"
    settings = folder / "settings.json"
    if _noted(settings) != json.loads(text):
        for file in folder.glob("*.png"):
            file.unlink()
        write_text(settings, text)
    files = [folder / f"{index:06}.png" for index in range(count)]
    found = [_read(file) for file in files]
    missing = [index for index, image in enumerate(found) if image is None]
    began = time.perf_counter()
    for index, image in zip(missing, make(missing)):
        now = time.perf_counter()
        found[index] = save_image(image, files[index], {"seconds": repr(now - began)}), now - began
        began = now
    images, seconds = zip(*filter(None, found))
    return list(images), sum(seconds) / count


def _read(file: Path) -> tuple[Image.Image, float] | None:
    """An image, and the seconds that it took; None if there is none, or a damaged one."""
    try:
        check_regular(file)
        with Image.open(file, formats=["PNG"]) as image:
            return image.convert("RGB"), float(image.info.get("seconds", 0))
    except (OSError, SyntaxError, ValueError):
        return None


def _noted(file: Path) -> Row | None:
    """What a JSON file holds; None if there is none, or a damaged one."""
    with suppress(UserError):
        return read_json(file)
    return None


def _losses(folder: Path, source: Source, sampler: ImageSampler, data: LossData) -> Row:
    """The losses of a source; kept in a file until its weights, the images or the seed change."""
    held_out, trained = data.samples(sampler.side, sampler.size_multiple)
    asked = {"weights": source.fingerprint, "seed": data.seed}
    asked |= {"held_out": [digest for _, digest in held_out], "trained": [digest for _, digest in trained]}
    file = folder / f"{_slug(source.name)}-losses.json"
    kept = _noted(file) or {}
    if kept.get("of") == asked and isinstance(kept.get("losses"), dict):
        return kept["losses"]
    images, twin = (fixed_images(sampler, samples, data.seed) for samples in (held_out, trained))
    found: Row = {"ln V": math.log(sampler.num_codes)}
    with Progress(2 * len(held_out) + len(trained), "computed the loss of", "images", len(TIMES)) as progress:
        found |= held_out_losses(sampler, images, twin, LOSS_BATCH, progress.advance)
    write_text(file, json.dumps({"of": asked, "losses": found}, indent=2) + "\n")
    return found


def _rows(
    images: Sequence[Image.Image], gallery: Gallery | None, data: EvalData, per_caption: int,
    scores: Sequence[Score],
) -> Iterator[Row]:  # fmt: skip
    """A row for each group of captions."""
    for group, indices in data.indices().items():
        generated = [images[index * per_caption + count] for index in indices for count in range(per_caption)]
        captions = [data.captions[index] for index in indices for _ in range(per_caption)]
        row: Row = {"group": group, "images": len(generated)}
        if gallery is not None:
            found = gallery.ranks(generated, captions)
            for k in (1, 5):
                row[f"retrieval@{k}"], row[f"retrieval@{k}_error"] = rate(found, k)
        for score in scores:
            originals = None if gallery is None else [gallery.images[index] for index in indices]
            row |= score.compute(generated, captions, originals)
        yield row


def _ceiling(source: Source, round_trips: Sequence[Image.Image], gallery: Gallery, data: EvalData) -> str:
    """Retrieval of the data's images after their round trip: the most that generated images can reach."""
    found = gallery.ranks(round_trips, data.captions)
    shares = [f"{rate(found[list(indices)], 1)[0]:.3f} {group}" for group, indices in data.indices().items()]
    return f"VQ ceiling of {source.name} {', '.join(shares)}"


def _name(setting: GenerationOptions) -> str:
    return f"guidance {setting.guidance_scale:g}, {setting.num_inference_steps} steps, {setting.order}"


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def _digest(values: Iterable[str | bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        digest.update(hashlib.blake2b(value.encode() if isinstance(value, str) else value).digest())
    return digest.hexdigest()


def _table(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row if not name.endswith("_error")))
    lines = [f"| {' | '.join(name.replace('_', ' ') for name in columns)} |", "|---" * len(columns) + "|"]
    return "\n".join(lines + [f"| {' | '.join(_cell(row, name) for name in columns)} |" for row in rows])


def _cell(row: Row, name: str) -> str:
    value = row.get(name, "")
    if not isinstance(value, float):
        return str(value)
    error = row.get(f"{name}_error")
    return f"{value:.4g}" if error is None else f"{value:.3f} ± {error:.3f}"


def _write_grid(path: Path, data: EvalData, columns: Mapping[str, Sequence[Image.Image]]) -> None:
    """Some captions of each group: the data's image, its round trip, and the image of each setting, side by side."""
    groups, cells = data.indices(), []
    for group, indices in groups.items():
        for number in spread(len(indices), IN_GRID // len(groups)):
            index = indices[number]
            suffix = "" if group == "all" else f" ({group})"
            labels = [f"{data.captions[index]}{suffix}", *list(columns)[1:]]
            cells += [(label, images[index]) for label, images in zip(labels, columns.values())]
    save_image(grid(cells, columns=len(columns) * max(1, CELLS // len(columns))), path)
