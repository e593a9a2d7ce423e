"""Peak memory and speed of the recipes beside the published figures: one process a row.

    python -m benchmarks.memory --size full     # on a GPU: the table of configs/amused/README.md
    python -m benchmarks.memory --size tiny     # anywhere: the same rows over a tiny model
    python -m benchmarks.memory --size full --counted   # anywhere: counted, not measured

Models have random weights in the real layout, images are real photos, and nothing is downloaded. The figure
is the most that torch had allocated, previews apart; on a CPU it is the process's resident memory.
Published: the aMUSEd example of diffusers, fp16, one GPU.
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks import common, counted
from diffengine.engine.build import load_config

# (config, images per step, images at once, published GB)
ROWS = [
    ("amused_256_own", 8, 8, 19.7),
    ("amused_256_own", 8, 4, 18.3),
    ("amused_256_own", 8, 1, 17.9),
    ("amused_256_nouns_8bit", 16, 16, 20.1),
    ("amused_256_nouns_8bit", 16, 8, 15.6),
    ("amused_256_nouns_8bit", 16, 1, 10.7),
    ("amused_256_own_lora", 16, 16, 14.1),
    ("amused_256_own_lora", 16, 8, 10.1),
    ("amused_256_own_lora", 16, 1, 6.5),
    ("amused_512_own", 8, 8, 24.2),
    ("amused_512_own", 8, 4, 19.7),
    ("amused_512_own", 8, 1, 16.99),
    ("amused_512_minecraft_8bit", 8, 8, 21.2),
    ("amused_512_minecraft_8bit", 8, 4, 13.3),
    ("amused_512_minecraft_8bit", 8, 1, 9.9),
    ("amused_512_own_lora", 8, 8, 12.7),
    ("amused_512_own_lora", 8, 4, 9.0),
    ("amused_512_own_lora", 8, 1, 5.6),
]


def measure(config: str, model: Path, data: Path, *settings: str) -> dict[str, float] | str:
    """The last line of a run's metrics, or in words why there is none."""
    with tempfile.TemporaryDirectory() as scratch:
        work_dir = Path(scratch) / "run"
        problem = common.python(
            *common.diffengine("train", config, model, data, work_dir, "--cfg-options"), *common.STEPS_ONLY,
            "max_iters=4", "log_every=1", "num_workers=2", *settings,
        )  # fmt: skip
        if problem:
            return problem.replace("|", "/")
        return json.loads((work_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def count(config: str, model: Path, at_once: int, *settings: str) -> dict[str, float] | str:
    """As `measure`, by `counted`: no speed."""
    _, resolved = load_config(config, list(settings), {"pretrained": str(model)})
    return {"memory_gb": counted.peak_of(resolved, at_once) / 1e9}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--size", choices=common.SIZES, default="tiny")
    parser.add_argument("--rows", default="", help="only configs whose name holds this")
    parser.add_argument("--first", type=int, help="only so many of them")
    parser.add_argument("--cached", action="store_true", help="from a token cache")
    parser.add_argument("--counted", action="store_true", help="count tensors, and compute nothing")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    options = parser.parse_args(arguments)
    rows = [row for row in ROWS if options.rows in row[0]][: options.first]
    how = f"{', cached' * options.cached}{', gradient checkpointing' * options.checkpointing}"
    print(f"{options.size} model on {common.machine()}{how}\n")
    table = common.Table("config", "images per step", "at once", "GB", "published GB", "images/s")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = common.write_images(root / "photos", 64)
        for config, batch, at_once, published in rows:
            resolution = int(config.split("_")[1])
            model = root / str(resolution)
            if not model.exists():
                common.make_model(model, options.size, resolution)
            shape = (
                f"batch_size={batch}", f"micro_batch_size={at_once}",
                f"gradient_checkpointing={options.checkpointing}",
            )  # fmt: skip
            if options.counted:
                found = count(config, model, at_once, *shape)
            else:
                way = "cached" if options.cached else "online"
                found = measure(config, model, data, *common.tokens(way, root / f"cache-{resolution}"), *shape)
            if isinstance(found, str):
                cells = (found, published, "")
            else:
                speed = found.get("images_per_second")
                cells = (f"{found['memory_gb']:.2f}", published, f"{speed:.2f}" if speed else "")
            table.row(f"`{config}`", batch, at_once, *cells)


if __name__ == "__main__":
    main()
