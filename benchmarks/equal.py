"""Checks that a change does not alter results: trains with another commit and with this tree, and compares bit for bit.

    python -m benchmarks.equal --against COMMIT

The other commit is checked out into a temporary git worktree. Both run on the same machine, since results differ in
their last bits between processors. Each config is trained at tiny size. Checkpoints, metrics (without times and
memory), exports and previews are compared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import common
from tests.support import models, photos

# Options that make each config small. amused_32_emoji uses the VQ model that vq_32_emoji trained.
RUNS = {
    "amused_512_own": ["resolution=32", "max_iters=6", "checkpoint_every=3", "preview_every=3", "prompts=2"],
    "amused_256_own_lora": ["resolution=32", "max_iters=6", "checkpoint_every=3", "preview_every=None", "cache=False"],
    "vq_32_emoji": ["emoji=8", "max_iters=30", "quantize_after=5", "preview_every=15", "checkpoint_every=15"],
    "amused_32_emoji": ["emoji=8", "max_iters=12", "preview_every=6", "checkpoint_every=6", "log_every=3"],
}
LABELS = {"folder", "version"}  # checkpoint entries that depend on where and by which version it was written
UNSTABLE = {  # metrics that differ from run to run
    "time", "images_per_second", "tokens_per_second", "seconds_per_step", "data_wait", "memory_gb",
}  # fmt: skip


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Check out a commit into a temporary git worktree, which is removed after the block."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree"
        git = ["git", "-C", str(common.ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(path), commit], check=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


def train(tree: Path, folder: Path, config: str, inputs: list[str]) -> Path:
    """Train a config with the code of a tree, and return its work dir."""
    command = ["-m", "diffengine", "train", config, *inputs, "--cfg-options", *RUNS[config], "num_workers=0"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-P", *command], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return folder / "work_dirs" / config


def differences(one: Any, other: Any, name: str) -> list[str]:
    """Names of the nested values that differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = dict.fromkeys([*one, *other])
        return [found for key in names for found in differences(one.get(key), other.get(key), f"{name}.{key}")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [name]
    return [] if one == other else [name]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without the values that differ from run to run."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in UNSTABLE} for line in lines]


def compare(one: Path, other: Path) -> tuple[int, list[str]]:
    """Compare the files of work dir `one` with those of `other`. Returns their number and the differences."""
    found, count = [], 0
    for file in sorted(path for path in one.rglob("*") if path.suffix in (".pth", ".jsonl", ".safetensors", ".png")):
        counterpart, name = other / file.relative_to(one), str(file.relative_to(one))
        count += 1
        if not counterpart.exists():
            found.append(f"{name} is missing")
        elif file.suffix == ".pth":
            states = [torch.load(path, weights_only=True) for path in (file, counterpart)]
            old, new = ({key: state[key] for key in state if key not in LABELS} for state in states)
            found += differences(old, new, name)
        elif file.suffix == ".jsonl":
            found += [] if read_metrics(file) == read_metrics(counterpart) else [name]
        elif file.suffix == ".safetensors":
            found += differences(load_file(file), load_file(counterpart), name)
        elif file.read_bytes() != counterpart.read_bytes():
            found.append(name)
    return count, found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--against", default="HEAD", help="the commit to compare with (default HEAD)")
    parser.add_argument("--config", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    options = parser.parse_args(arguments)
    print(f"this tree compared with {options.against}, on {common.machine()}\n")
    table = common.Table("config", "files", "differences")
    failed = False
    with worktree(options.against) as other, tempfile.TemporaryDirectory() as root:
        model = models.make_model_folder(Path(root) / "model", "toy")
        photos.write_photo_folder(Path(root) / "data", 10, 40)
        sides = []
        for name, tree in (("new", common.ROOT), ("old", other)):
            (folder := Path(root) / name).mkdir()
            sides.append((tree, folder))
        for config in options.config:
            inputs = [] if "emoji" in config else ["--pretrained", str(model), "--data", str(Path(root) / "data")]
            new, old = (train(tree, folder, config, inputs) for tree, folder in sides)
            count, found = compare(old, new)
            table.row(config, count, "none" if not found else "; ".join(found[:5]))
            failed |= bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
