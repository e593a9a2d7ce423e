"""The token cache: images per second while it is built, its size, and samples per second while it is read.

    python -m benchmarks.cache --size mid --resolution 256 512

Building reads images by workers, encodes them, and writes; a form is one crop and flip of an image.
Reading is what one worker does of a step, on one thread: samples of a batch with their masks drawn, collated.
A caption's row holds the frozen text encoder's outputs, and is looked up by the main process.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import common
from diffengine.cache import TokenCache
from diffengine.datasets import Stream, collate
from diffengine.engine.run import Run


def build(run: Run, root: Path) -> tuple[float, float]:
    """Seconds to build the cache, and to find it good at the next start."""
    seconds, optim = [], run.optim_wrapper
    for _ in range(2):
        started = time.perf_counter()
        TokenCache(
            use=True, path=str(root / "cache"), stream=run.train_loop.stream, encoder=run.trainable.encoder,
            data=run.job.resolved["train_dataloader"], work_dir=root / "run", precision=optim.precision,
            autocast=optim.autocast,
        ).attach(1)  # fmt: skip
        seconds.append(time.perf_counter() - started)
    return seconds[0], seconds[1]


def read(stream: Stream, options: argparse.Namespace) -> list[float]:
    """Seconds for each batch."""
    seconds = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for index in range(options.batches):
        started = time.perf_counter()
        collate(stream.__getitems__(range(index * options.batch, (index + 1) * options.batch)))
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return seconds[1:] or seconds


def measure(root: Path, resolution: int, options: argparse.Namespace) -> list[str]:
    """The cells of one resolution."""
    model = common.make_model(root / "model", options.size, resolution)
    data = common.write_images(root / "data", options.images)
    run = common.build(
        f"amused_{resolution}_own",
        root / "run",
        [*common.STEPS_ONLY, f"image_variations={options.variations}", "cache=False",
         f"num_workers={options.workers}"],
        {"data": str(data), "pretrained": str(model)},
    )  # fmt: skip
    built, again = build(run, root)
    images, captions = (root / "cache" / f"{name}.arrow" for name in ("pictures", "captions"))
    rows = options.images * options.variations
    return [
        f"{rows / built:.3g}",
        f"{images.stat().st_size / rows:.0f}",
        f"{captions.stat().st_size / (options.images + 1):,.0f}",  # one row is of no caption
        f"{options.batch / statistics.median(read(run.train_loop.stream, options)):,.0f}",
        f"{again:.2f}",
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--size", choices=common.SIZES, default="tiny")
    parser.add_argument("--resolution", nargs="+", type=int, choices=(256, 512), default=[512])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--variations", type=int, default=4, help="of each image")
    parser.add_argument("--batch", type=int, default=64, help="samples that are read at once")
    parser.add_argument("--batches", type=int, default=200, help="that are read")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images while building")
    options = parser.parse_args(arguments)
    print(f"{options.images} images in {options.variations} variations each on {common.machine()}\n")
    table = common.Table(
        "size", "px", "rows/s built", "bytes/row", "bytes/caption", "samples/s read", "s at the next start"
    )
    for resolution in options.resolution:
        with tempfile.TemporaryDirectory() as folder, common.aside():
            cells = measure(Path(folder), resolution, options)
        table.row(options.size, resolution, *cells)


if __name__ == "__main__":
    main()
