"""Peak memory and speed of the recipes, compared with published figures.

    python -m benchmarks.memory --size full     # on a GPU: the table of configs/amused/README.md
    python -m benchmarks.memory --size tiny     # anywhere: the same rows with a tiny model
    python -m benchmarks.memory --size full --counted   # anywhere: counted with fake tensors

Models have random weights in the real architecture, images are real photos, and nothing is downloaded. Each row runs in
its own process. Memory is the peak that torch allocated, without previews; on a CPU it is the process's peak resident
memory. Published figures: the aMUSEd example of diffusers in fp16 on one GPU.
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks import common, counted
from diffengine.engine.build import load_config

# (config, batch size, micro-batch size, published GB)
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
    """The last line of a run's metrics, or the error message if the run failed."""
    with tempfile.TemporaryDirectory() as scratch:
        work_dir = Path(scratch) / "run"
        problem = common.run_python(
            *common.diffengine_command("train", config, model, data, work_dir, "--cfg-options"), *common.STEPS_ONLY,
            "max_iters=4", "log_every=1", "num_workers=2", *settings,
        )  # fmt: skip
        if problem:
            return problem.replace("|", "/")
        return json.loads((work_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def count(config: str, model: Path, micro_batch_size: int, *settings: str) -> dict[str, float] | str:
    """Like `measure`, but counted with fake tensors: memory only, no speed."""
    _, resolved = load_config(config, list(settings), {"pretrained": str(model)})
    return {"memory_gb": counted.peak_of(resolved, micro_batch_size) / 1e9}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--size", choices=common.SIZES, default="tiny")
    parser.add_argument("--rows", default="", help="only configs whose name contains this")
    parser.add_argument("--first", type=int, help="only the first N rows")
    parser.add_argument("--cached", action="store_true", help="train from a token cache")
    parser.add_argument("--counted", action="store_true", help="count fake tensors instead of training")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    options = parser.parse_args(arguments)
    rows = [row for row in ROWS if options.rows in row[0]][: options.first]
    mode = f"{', cached' * options.cached}{', gradient checkpointing' * options.checkpointing}"
    print(f"{options.size} model on {common.machine()}{mode}\n")
    table = common.Table("config", "batch", "micro-batch", "GB", "published GB", "images/s")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = common.write_images(root / "photos", 64)
        for config, batch, micro_batch, published in rows:
            resolution = int(config.split("_")[1])
            model = root / str(resolution)
            if not model.exists():
                common.make_model(model, options.size, resolution)
            settings = (
                f"batch_size={batch}", f"micro_batch_size={micro_batch}",
                f"gradient_checkpointing={options.checkpointing}",
            )  # fmt: skip
            if options.counted:
                result = count(config, model, micro_batch, *settings)
            else:
                tokens = common.token_options("cached" if options.cached else "online", root / f"cache-{resolution}")
                result = measure(config, model, data, *tokens, *settings)
            if isinstance(result, str):
                cells = (result, published, "")
            else:
                speed = result.get("images_per_second")
                cells = (f"{result['memory_gb']:.2f}", published, f"{speed:.2f}" if speed else "")
            table.row(f"`{config}`", batch, micro_batch, *cells)


if __name__ == "__main__":
    main()
