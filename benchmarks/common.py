"""Shared by the benchmarks: models, images, timed runs and tables.

Models have random weights in the real architecture, images are real photos, and nothing is downloaded.
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
DISTINCT_PHOTOS = 64  # further ones are hard links to these
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# 15.6M parameters at 512 px. As at full size, the VQ encoder takes 55 % of a step's FLOPs.
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

# The shipped recipes are timed without the hooks that run only at some steps.
STEPS_ONLY = tuple(f"default_hooks.{name}=None" for name in ("preview", "validation", "checkpoint", "export", "report"))


# ------------------------------------------------------------------------------------- models and images


def transformer_sizes(size: str, resolution: int) -> dict[str, Any]:
    """Arguments for UVit2DModel."""
    if size == "mid":
        return {**models.transformer_config("full", resolution), **MID_TRANSFORMER}
    return models.transformer_config(size, resolution)  # type: ignore[arg-type]


def make_pipeline(size: str, resolution: int) -> AmusedPipeline:
    """A pipeline with random weights for 256 or 512 px, in eval mode; size is one of SIZES."""
    if size != "mid":
        return models.make_pipeline(size, resolution=resolution)  # type: ignore[arg-type]
    transformer = transformer_sizes(size, resolution)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AmusedPipeline(
            vqvae=VQModel(**{**models.vq_config("full"), **MID_VQ}).eval(),
            tokenizer=models.make_tokenizer("tiny"),
            text_encoder=CLIPTextModelWithProjection(
                CLIPTextConfig(**{**models.text_config("tiny"), **MID_TEXT})
            ).eval(),
            transformer=UVit2DModel(**transformer).eval(),
            scheduler=AmusedScheduler(mask_token_id=transformer["vocab_size"] - 1, masking_schedule="cosine"),
        )


def make_model(path: Path, size: str, resolution: int) -> Path:
    """Write a pipeline folder for 256 or 512 px; size is one of SIZES: 4 MB, 90 MB or 3.5 GB on disk."""
    if size != "mid":
        return models.make_model_folder(path, size, resolution=resolution)  # type: ignore[arg-type]
    make_pipeline(size, resolution).save_pretrained(path)
    return path


def write_images(path: Path, count: int) -> Path:
    """Write a folder of `count` captioned square photos, PHOTO_SIDE pixels wide, with a metadata.csv."""
    files = list(photos.write_photo_folder(path, min(count, DISTINCT_PHOTOS), PHOTO_SIDE))
    rows = [f'"{file}","photo {number}"' for number, file in enumerate(files)]
    for number in range(len(files), count):
        original = path / files[number % len(files)]
        os.link(original, path / f"{number}{original.suffix}")
        rows.append(f'"{number}{original.suffix}","photo {number}"')
    (path / "metadata.csv").write_text("\n".join(["file_name,text", *rows]) + "\n", encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------- timed runs


def build(name: str, work_dir: Path, options: Sequence[str], settings: dict[str, Any]) -> Run:
    """Build a run in this process, ready to train. Deletes an existing work dir."""
    job = replace(make_job(name, *load_config(name, options, settings), DEVICE), work_dir=work_dir)
    with workdir.claimed(work_dir, None, overwrite=True):
        return build_run(job)


@dataclass
class Timings:
    """Measurements of a program, up to its last timed optimizer step.

    Attributes:
        first: seconds from the start of the program to the end of its first step.
        seconds: seconds from the end of one step to the end of the next; one value fewer than steps.
        memory_gb: peak memory that torch allocated on the GPU; on a CPU, peak resident memory of the process.
        torch: the version of torch.
    """

    first: float
    seconds: list[float]
    memory_gb: float
    torch: str


def run_python(*arguments: str, executable: str = sys.executable, **environment: str) -> str | None:
    """Run Python until it exits. Returns None, or the last line of stderr if it failed."""
    result = subprocess.run(
        [executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT,
        env={
            **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "GOMP_SPINCOUNT": "10000",  # the diffengine command sets it; the reference gets it too
            **environment,
        },
    )  # fmt: skip
    if result.returncode == 0:
        return None
    return (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]


def run_timed(
    command: Sequence[str], steps: int, executable: str = sys.executable, **environment: str
) -> Timings | str:
    """Run a program until it has taken `steps` optimizer steps.

    Args:
        command: arguments for Python: a script's path or "-m" and a module's name, then their arguments.

    Returns:
        The measurements, or the last line of stderr if the program failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        timer = str(Path(__file__).with_name("timed.py"))
        started = time.time()
        problem = run_python(timer, str(out), str(steps), *command, executable=executable, **environment)
        if not out.exists():
            return problem or f"the program exited before step {steps}"
        result = json.loads(out.read_text(encoding="utf-8"))
        return Timings(result["first_ended"] - started, result["seconds"], result["memory_gb"], result["torch"])


def diffengine_command(command: str, config: str, model: Path, data: Path, work_dir: Path, *rest: str) -> list[str]:
    """A `diffengine` command line for `run_python` and `run_timed`."""
    return [
        "-m", "diffengine", command, config, "--pretrained", str(model), "--data", str(data),
        "--work-dir", str(work_dir), *rest,
    ]  # fmt: skip


def token_options(mode: str, cache: Path) -> list[str]:
    """Config options: "online" encodes images at every step, "cached" reads tokens from this folder."""
    return ["cache=True", f"cache_path={cache}", "image_variations=1"] if mode == "cached" else ["cache=False"]


# ---------------------------------------------------------------------------------------------- output


def machine() -> str:
    """The device and the version of torch, for the line above a table."""
    cores = f"{len(os.sched_getaffinity(0))} CPU cores, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cores
    return f"{device}, torch {torch.__version__}"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Format as "median (first quartile to third quartile)". Needs at least one value."""
    low, middle, high = statistics.quantiles(values, method="inclusive") if values[1:] else [*values] * 3
    return f"{middle:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


def stdout_to_stderr() -> AbstractContextManager:
    """Redirect prints to stderr, so that stdout holds only the table."""
    return redirect_stdout(sys.stderr)


class Table:
    """A Markdown table, printed row by row."""

    def __init__(self, *columns: str) -> None:
        self.columns = columns
        self.row(*columns)
        self.row(*["---"] * len(columns))

    def row(self, *cells: Any) -> None:
        """Print a row, with one cell per column."""
        assert len(cells) == len(self.columns)
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
