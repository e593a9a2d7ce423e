"""What the benchmarks share: models, images, runs that are timed from outside, and tables.

Models have random weights in the real layout, images are real photos, and nothing is downloaded.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel, VQModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from diffengine.engine import workdir
from diffengine.engine.build import load_config, make_job
from diffengine.engine.run import Run, build_run
from tests.support import models, photos

SIZES = ("tiny", "mid", "full")
ROOT = Path(__file__).parents[1]
PHOTO_SIDE = 600  # pixels of the square photos
DISTINCT_PHOTOS = 64  # the others are the same files by another name
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# 15.6M parameters at 512 px, of which the VQ encoder takes 55 % of a step's arithmetic, as at full size.
MID_TRANSFORMER = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 5, "num_attention_heads": 4,
    "in_channels": 192, "block_out_channels": 192, "block_num_heads": 3, "cond_embed_dim": 192,
    "encoder_hidden_size": 192, "micro_cond_encode_dim": 64, "micro_cond_embed_dim": 320,
}  # fmt: skip
MID_VQ = {"block_out_channels": [24, 48, 48, 96, 144], "norm_num_groups": 8}
MID_TEXT = {
    "hidden_size": 192, "projection_dim": 192, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 4,
}  # fmt: skip

# Recipes are timed as they are shipped, but for what only some steps do.
STEPS_ONLY = ("default_hooks.preview=None", "default_hooks.checkpoint=None", "default_hooks.export=None")


# ------------------------------------------------------------------------------------- models and images


def transformer_sizes(size: str, resolution: int) -> dict[str, Any]:
    """Arguments of UVit2DModel."""
    if size == "mid":
        return {**models.transformer_config("full", resolution), **MID_TRANSFORMER}
    return models.transformer_config(size, resolution)  # type: ignore[arg-type]


def make_model(path: Path, size: str, resolution: int) -> Path:
    """A pipeline folder of a size of SIZES for 256 or 512 px: 4 MB, 90 MB or 3.5 GB on the disk."""
    if size != "mid":
        return models.make_model_folder(path, size, resolution=resolution)  # type: ignore[arg-type]
    transformer = transformer_sizes(size, resolution)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AmusedPipeline(
            vqvae=VQModel(**{**models.vq_config("full"), **MID_VQ}),
            tokenizer=models.make_tokenizer("tiny"),
            text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**{**models.text_config("tiny"), **MID_TEXT})),
            transformer=UVit2DModel(**transformer),
            scheduler=AmusedScheduler(mask_token_id=transformer["vocab_size"] - 1, masking_schedule="cosine"),
        ).save_pretrained(path)
    return path


def write_images(path: Path, count: int) -> Path:
    """A folder of `count` captioned photos with a metadata.csv, PHOTO_SIDE pixels square."""
    said = photos.write_photo_folder(path, min(count, DISTINCT_PHOTOS), PHOTO_SIDE)
    rows = [f'"{file}","photo {number}"' for number, file in enumerate(said)]
    files = list(said)
    for number in range(len(files), count):
        original = path / files[number % len(files)]
        os.link(original, path / f"{number}{original.suffix}")
        rows.append(f'"{number}{original.suffix}","photo {number}"')
    (path / "metadata.csv").write_text("\n".join(["file_name,text", *rows]) + "\n", encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------- timed runs


def build(name: str, work_dir: Path, options: Sequence[str], settings: dict[str, Any]) -> Run:
    """A run in this process that is ready to train; what the work dir holds is deleted."""
    job = replace(make_job(name, *load_config(name, options, settings), DEVICE), work_dir=work_dir)
    with workdir.claimed(work_dir, None, overwrite=True):
        return build_run(job)


@dataclass
class Timings:
    """What a program did up to its last timed optimizer step.

    Attributes:
        first: seconds from the start of the program to the end of its first step.
        seconds: from the end of one step to the end of the next; one less than there were steps.
        memory_gb: the most that torch had allocated on the GPU; on a CPU the process's resident memory.
        torch: its version.
    """

    first: float
    seconds: list[float]
    memory_gb: float
    torch: str


def python(*arguments: str, executable: str = sys.executable, **environment: str) -> str | None:
    """Run Python to its end; None, or the last line of its errors."""
    done = subprocess.run(
        [executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT,
        env={
            **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "GOMP_SPINCOUNT": "10000",  # as the diffengine command sets it: for the reference as well
            **environment,
        },
    )  # fmt: skip
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def timed(command: Sequence[str], steps: int, executable: str = sys.executable, **environment: str) -> Timings | str:
    """Run a script (its path first) or a module ("-m", its name) until it has taken `steps` optimizer steps.

    Returns:
        The run, or the last line of its errors.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        watch = str(Path(__file__).with_name("timed.py"))
        started = time.time()
        problem = python(watch, str(out), str(steps), *command, executable=executable, **environment)
        if not out.exists():
            return problem or f"it ended before step {steps}"
        found = json.loads(out.read_text(encoding="utf-8"))
        return Timings(found["ended"] - started, found["seconds"], found["memory_gb"], found["torch"])


def diffengine(command: str, config: str, model: Path, data: Path, work_dir: Path, *rest: str) -> list[str]:
    """A command line of ours, for `python` and `timed`."""
    return [
        "-m", "diffengine", command, config, "--pretrained", str(model), "--data", str(data),
        "--work-dir", str(work_dir), *rest,
    ]  # fmt: skip


def tokens(way: str, cache: Path) -> list[str]:
    """The settings of "online", tokens made at each step, or "cached", read from this folder."""
    return ["cache=True", f"cache_path={cache}", "image_variations=1"] if way == "cached" else ["cache=False"]


# ------------------------------------------------------------------------------------------- what is said


def machine() -> str:
    """The device and torch, for the line above a table."""
    cores = f"{len(os.sched_getaffinity(0))} CPU cores, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cores
    return f"{device}, torch {torch.__version__}"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """ "median (first quartile to third)", of at least one value."""
    low, middle, high = statistics.quantiles(values, method="inclusive") if values[1:] else [*values] * 3
    return f"{middle:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


def aside() -> AbstractContextManager:
    """What is printed inside goes to the errors' stream, so that the output is tables alone."""
    return redirect_stdout(sys.stderr)


class Table:
    """A Markdown table, row by row as they come."""

    def __init__(self, *columns: str) -> None:
        self.columns = columns
        self.row(*columns)
        self.row(*["---"] * len(columns))

    def row(self, *cells: Any) -> None:
        """One cell for each column."""
        assert len(cells) == len(self.columns)
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
