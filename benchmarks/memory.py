"""Peak memory and speed of the recipes beside the published figures: one process a row.

    python benchmarks/memory.py --size full     # on a GPU: the table of configs/amused/README.md
    python benchmarks/memory.py --size tiny     # anywhere: the same rows over a tiny model

Models have random weights in the real layout, pictures are real photos, and nothing is downloaded. The figure
is the most that torch had allocated, previews apart; on a CPU it is the process's resident memory.
Published: the aMUSEd example of diffusers, fp16, one GPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support import models, pictures

# (config, pictures per step, pictures at once, published GB)
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


def measure(
    config: str, batch: int, at_once: int, folders: dict[int, Path], extra: list[str]
) -> dict[str, float] | str:
    """The last line of a run's metrics, or in words why there is none."""
    resolution = int(config.split("_")[1])
    with tempfile.TemporaryDirectory() as work_dir:
        command = [
            sys.executable, "-m", "diffengine", "train", config, "--data", str(folders[0]), "--pretrained",
            str(folders[resolution]), "--work-dir", work_dir, "--cfg-options", f"batch_size={batch}",
            f"micro_batch_size={at_once}", "max_iters=4", "log_every=1", "num_workers=2",
            "checkpoint_every=None", "default_hooks.preview=None", "default_hooks.checkpoint=None",
            "default_hooks.export=None", *extra,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["failed"])[-1]
        lines = (Path(work_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--rows", default="", help="only configs whose name holds this")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    extra = ["gradient_checkpointing=True"] if options.checkpointing else []
    how = ", gradient checkpointing" if extra else ""
    print(f"{options.size} model on {device}, torch {torch.__version__}{how}\n")
    print("| config | pictures per step | at once | GB | published GB | pictures/s |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        folders = {0: Path(root) / "photos"}
        pictures.write_photo_folder(folders[0], n=16, size=600)
        for resolution in (256, 512):
            if any(f"_{resolution}_" in row[0] and options.rows in row[0] for row in ROWS):
                folders[resolution] = Path(root) / str(resolution)
                models.make_model_folder(folders[resolution], options.size, resolution=resolution)
        for config, batch, at_once, published in ROWS:
            if options.rows in config:
                found = measure(config, batch, at_once, folders, extra)
                measured = (
                    f"{found} | {published} | |" if isinstance(found, str)
                    else f"{found['memory_gb']:.2f} | {published} | {found['images_per_second']:.2f} |"
                )  # fmt: skip
                print(f"| `{config}` | {batch} | {at_once} | {measured}", flush=True)


if __name__ == "__main__":
    main()
