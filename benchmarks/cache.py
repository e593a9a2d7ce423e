"""Token cache: build speed, size and read speed.

    python -m benchmarks.cache --size mid --resolution 256 512

Building: workers read the images, the main process encodes them and writes the cache. A row is one variation, that is
one crop and flip, of an image. Reading: one worker on one thread reads the samples of a batch, draws their masks and
collates them. A caption row holds the outputs of the frozen text encoder; the main process looks it up.
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
    """Seconds to build the cache, and to validate it at the next start."""
    seconds, optim = [], run.optim_wrapper
    for _ in range(2):
        started = time.perf_counter()
        cache = TokenCache(
            use=True, path=str(root / "cache"), stream=run.train_loop.stream, encoder=run.trainable.encoder,
            data=run.job.resolved["train_dataloader"], work_dir=root / "run", precision=lambda: optim.precision,
            autocast=optim.autocast,
        )  # fmt: skip
        cache.attach_images(1)
        cache.attach_captions()
        seconds.append(time.perf_counter() - started)
    return seconds[0], seconds[1]


def read(stream: Stream, options: argparse.Namespace) -> list[float]:
    """Seconds per batch, without the first."""
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
    """Table cells for one resolution."""
    model = common.make_model(root / "model", options.size, resolution)
    data = common.write_images(root / "data", options.images)
    run = common.build(
        f"amused_{resolution}_own",
        root / "run",
        [*common.STEPS_ONLY, f"image_variations={options.variations}", "cache=False",
         f"num_workers={options.workers}"],
        {"data": str(data), "pretrained": str(model)},
    )  # fmt: skip
    building, validating = build(run, root)
    images, captions = (root / "cache" / f"{name}.arrow" for name in ("pictures", "captions"))
    rows = options.images * options.variations
    return [
        f"{rows / building:.3g}",
        f"{images.stat().st_size / rows:.0f}",
        f"{captions.stat().st_size / (options.images + 1):,.0f}",  # plus the empty caption
        f"{options.batch / statistics.median(read(run.train_loop.stream, options)):,.0f}",
        f"{validating:.2f}",
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--size", choices=common.SIZES, default="tiny")
    parser.add_argument("--resolution", nargs="+", type=int, choices=(256, 512), default=[512])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--variations", type=int, default=4, help="variations per image")
    parser.add_argument("--batch", type=int, default=64, help="samples per batch")
    parser.add_argument("--batches", type=int, default=200, help="batches to read")
    parser.add_argument("--workers", type=int, default=2, help="data loader workers for building")
    options = parser.parse_args(arguments)
    print(f"{options.images} images, {options.variations} variations each, on {common.machine()}\n")
    table = common.Table("size", "px", "rows/s built", "bytes/row", "bytes/caption", "samples/s read", "s to validate")
    for resolution in options.resolution:
        with tempfile.TemporaryDirectory() as folder, common.stdout_to_stderr():
            cells = measure(Path(folder), resolution, options)
        table.row(options.size, resolution, *cells)


if __name__ == "__main__":
    main()
