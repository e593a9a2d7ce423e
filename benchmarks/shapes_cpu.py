"""Images of any shape against square crops: pixels lost, steps of one shape, and speed.

    python -m benchmarks.shapes --size mid --images 200 --sizes 30

The same images are trained from a token cache with aspect="square" and aspect="keep", a few steps in turn.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import common
from diffengine.datasets import Shapes
from diffengine.engine.run import Run
from tests.support.photos import captioned_photos

SIDE = 256  # pixels of the square


def write_images(folder: Path, images: int, sizes: int) -> list[tuple[int, int]]:
    """Photos of as many pixels as the square, in so many sizes from 1:2 to 2:1; returns the size of each."""
    folder.mkdir()
    ratios = np.exp(np.random.default_rng(0).uniform(-np.log(2), np.log(2), size=sizes))
    found = []
    for number, (_, image, caption) in enumerate(captioned_photos(images, SIDE)):
        ratio = float(ratios[number % sizes])
        found.append((round(1.2 * SIDE * ratio**0.5), round(1.2 * SIDE / ratio**0.5)))
        image.resize(found[-1]).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(caption)
    return found


def share_of_one_shape(run: Run, epochs: int = 3) -> float:
    """Of the steps of some epochs."""
    stream, size = run.train_loop.stream, run.clock.batch_size
    assert stream.shapes is not None
    shapes = [stream.shapes[stream.locate(position)[1]] for position in range(epochs * len(stream))]
    steps = [set(shapes[start : start + size]) for start in range(0, len(shapes) - size + 1, size)]
    return sum(len(step) == 1 for step in steps) / len(steps)


def build(aspect: str, root: Path, model: Path, batch: int) -> Run:
    options = [*common.STEPS_ONLY, "cache=True", "num_workers=0", f"aspect={aspect}", f"batch_size={batch}",
               "image_variations=1"]  # fmt: skip
    settings = {"data": str(root / "data"), "pretrained": str(model), "max_iters": 10_000}
    return common.build("amused_256_own", root / aspect, options, settings)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--size", choices=common.SIZES, default="tiny")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--sizes", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25, help="in turn, six times; 25 are an epoch of 200 images")
    options = parser.parse_args(arguments)
    print(f"{options.images} images of {options.sizes} sizes, batch {options.batch}, on {common.machine()}\n")
    with tempfile.TemporaryDirectory() as folder, common.stdout_to_stderr():
        root = Path(folder)
        sizes = write_images(root / "data", options.images, options.sizes)
        model = common.make_model(root / "model", options.size, SIDE)
        runs = {aspect: build(aspect, root, model, options.batch) for aspect in ("square", "keep")}
        seconds: dict[str, list[float]] = {aspect: [] for aspect in runs}
        for run in runs.values():
            run.train(steps=2)
        for _ in range(3):
            for aspect, run in runs.items():
                started = time.process_time()
                run.train(steps=options.steps)
                seconds[aspect].append(time.process_time() - started)
        shapes, pure = Shapes.made_by(runs["keep"].train_loop.stream.image_transforms), share_of_one_shape(runs["keep"])
    assert shapes is not None
    speed = {aspect: options.steps * options.batch / float(np.median(values)) for aspect, values in seconds.items()}
    table = common.Table("aspect", "shapes", "area lost", "steps of one shape", "images/s", "ratio")
    table.row("square", 1, f"{shapes.square.lost(sizes):.1%}", "100%", f"{speed['square']:.3g}", "1")
    ratio = f"{speed['keep'] / speed['square']:.2f}"
    used = len(set(map(shapes.of, sizes)))
    table.row("keep", used, f"{shapes.lost(sizes):.1%}", f"{pure:.0%}", f"{speed['keep']:.3g}", ratio)


if __name__ == "__main__":
    main()
