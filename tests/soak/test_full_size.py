"""Training at the full size: the layout and parameter counts of amused-512, random weights, on a CPU.

Needs 16 GB of memory, 16 GB of disk and the vocabulary in open-clip-torch.
"""

import importlib.util
import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import models, photos

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        importlib.util.find_spec("open_clip") is None,
        reason="the full vocabulary needs: pip install --no-deps open-clip-torch",
    ),
]
PROGRAM = Path(sys.executable).with_name("diffengine")
RUN = "work_dirs/amused_512_pokemon_blip"
STEPS = 2

SNIPPET = """
import sys, torch
from diffusers import AmusedPipeline, UVit2DModel

transformer = UVit2DModel.from_pretrained("work_dirs/amused_512_pokemon_blip", subfolder="transformer")
assert sum(parameter.numel() for parameter in transformer.parameters()) == 608_257_792
pipe = AmusedPipeline.from_pretrained(sys.argv[1], transformer=transformer)
image = pipe("yoda pokemon", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
assert image.size == (512, 512) and len(image.getcolors(1 << 24)) > 1000
"""


def test_parameter_counts() -> None:
    assert models.count_parameters("full", 256)["transformer"] == 603_537_664
    counts = models.count_parameters("full", 512)
    assert counts == {"transformer": 608_257_792, "vqvae": 146_244_675, "text_encoder": 123_650_304}


def run(command: str, cwd: Path) -> str:
    """Run a command line, which must succeed. Returns its output."""
    words = shlex.split(command)
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(PROGRAM), *words[1:]], cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_full_size(tmp_path: Path) -> None:
    """Run with -s to see the seconds per step and the peak memory of all child processes."""
    model = models.make_model_folder(tmp_path / "model", "full", resolution=512)
    captions = photos.write_photo_folder(tmp_path / "photos", 4)
    assert (tmp_path / "photos" / "metadata.csv").is_file()
    assert len(captions) == 4
    options = f"batch_size=1 max_epochs=None max_iters={STEPS} checkpoint_every={STEPS} log_every=1 num_workers=0"
    output = run(
        f"diffengine train amused_512_pokemon_blip --data {tmp_path}/photos --pretrained {model} "
        f"--cfg-options {options} default_hooks.preview=None",
        tmp_path,
    )
    assert "608,257,792 trained" in output
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    lines = [json.loads(line) for line in (tmp_path / RUN / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == STEPS
    checkpoint = f"{RUN}/iter_{STEPS}.pth"
    run(f"diffengine convert amused_512_pokemon_blip {checkpoint} {RUN} --save-keys transformer", tmp_path)
    program = [sys.executable, "-c", SNIPPET, str(model)]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"\nfull size, 512 px, batch size 1: peak memory {peak:.1f} GB")
    for line in steps:
        print({key: value for key, value in line.items() if key in ("loss", "seconds_per_step", "data_wait")})
