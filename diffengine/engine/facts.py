"""What a run's page says apart from its metrics: the data at a glance, and what the run runs on."""

import platform
from collections import Counter
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from diffengine import __version__, distributed
from diffengine.datasets import ImageDataset, Shapes, UnreadableImage, generator, spread
from diffengine.datasets.findings import BARS, evenly, histogram
from diffengine.datasets.images import faded
from diffengine.datasets.stream import IMAGE, Stream
from diffengine.datasets.transforms import apply
from diffengine.grids import save_webp

if TYPE_CHECKING:
    from diffengine.engine.run import Run

MOST_READ = 1000  # image headers and captions; of more, an evenly spaced sample
THUMBNAILS = 24
SIDE = 96  # of a thumbnail
PACKAGES = ("torch", "diffusers", "transformers", "mmengine", "peft")


def environment(run: "Run") -> dict[str, str]:
    """Versions, the device and how the run uses it, by name."""
    found = {"diffengine": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    device = run.job.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        **found,
        "device": f"{distributed.world_size()} x {name}",
        "precision": run.precision,
        "blocks": run.compiled,
        "trained parameters": f"{run.trained_parameters:,}",
    }


def data_at_a_glance(run: "Run") -> dict[str, Any]:
    """Counts, sizes, captions and thumbnails of the data; the thumbnails are written to `report/` in the work dir."""
    stream, clock = run.train_loop.stream, run.clock
    dataset = stream.dataset
    seen = clock.max_iters * clock.batch_size
    return {
        "images": len(dataset),
        "held_out": len(stream.split.held_out),
        "samples": seen,
        "epochs_per_image": seen / stream.images,
        **({"sources": stream.source_rows()} if len(stream.sources) > 1 else {}),
        **_sizes(dataset, Shapes.made_by(stream.image_transforms)),
        **_captions(run),
        "thumbnails": _thumbnails(stream, run.work_dir),
    }


def _sizes(dataset: ImageDataset, shapes: Shapes | None) -> dict[str, Any]:
    """How large the images are, in which shapes they are trained, what is cut off, and which cannot be read."""
    sizes, unreadable = [], []
    for index in evenly(len(dataset), MOST_READ):
        try:
            size = dataset.size(index)
        except UnreadableImage as error:
            unreadable.append(str(error))
            continue
        if size is None:
            return {}
        sizes.append(size)
    found: dict[str, Any] = {"unreadable": len(unreadable), "unreadable_files": unreadable[:50]}
    if not sizes:
        return found
    counts = Counter(sizes)
    if len(counts) <= BARS:
        bars = [[f"{width}×{height}", count] for (width, height), count in counts.most_common()]
        found["sizes"] = {"of": "width × height", "bars": bars}
    else:
        found["sizes"] = {"of": "short side in pixels", "bars": histogram([min(size) for size in sizes])}
    if shapes is not None:
        found["crop"] = shapes.side
        found["crop_lost"] = shapes.square.lost(sizes)
        found["enlarged"] = shapes.enlarged(sizes)
        if len(shapes.all) > 1:
            shaped = Counter(map(shapes.of, sizes)).most_common()
            bars = [[f"{width}×{height}", count] for (width, height), count in shaped]
            found["shapes"] = {"bars": bars, "lost": shapes.lost(sizes)}
    return found


def _captions(run: "Run") -> dict[str, Any]:
    """How long captions are, in tokens, and how many the model does not read to their end."""
    captions = [caption for each in run.train_loop.stream.dataset.all_captions() for caption in each]
    chosen = [captions[index] for index in evenly(len(captions), MOST_READ)]
    lengths, most = run.trainable.caption_lengths(chosen)
    if not most or not lengths:
        return {}
    cut = sum(length > most for length in lengths)
    return {"captions": {"bars": histogram(lengths), "longest": max(lengths), "read": most, "cut": cut,
                         "counted": len(lengths), "of": len(captions)}}  # fmt: skip


def _thumbnails(stream: Stream, work_dir: Path) -> list[dict[str, str]]:
    """Images after the crop, spread over the data: what the model is shown. Tokens that are not learnt are faded."""
    found: list[dict[str, str]] = []
    for index in spread(len(stream.dataset), THUMBNAILS):
        with suppress(UnreadableImage):
            sample = stream.dataset[index]
            if "image" not in sample:  # only their tokens are on this machine
                return []
            text = sample["text"]
            cropped = apply(stream.transforms_of(index), sample, generator(stream.seed, IMAGE, index))
            file = f"report/{len(found):02}.webp"
            mask = Image.fromarray(cropped["region"].numpy()) if "region" in cropped else None
            image = faded(as_image(cropped["image"]), mask)
            image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            save_webp(image, work_dir / file)
            found.append({"file": file, "caption": text if isinstance(text, str) else text[0]})
    return found


def as_image(value: Any) -> Image.Image:
    """A PIL image, or a tensor (3,H,W) of bytes or in [0,1], as an RGB image."""
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    pixels = value if value.dtype == torch.uint8 else (value.clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
