"""`diffengine sample`, in this process, and what works without diffusers' deprecated pipelines."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AmusedPipeline
from PIL import Image

from diffengine import api, cli
from diffengine.engine import checkpoint
from diffengine.models.pipelines import open_pipeline
from tests.engine.runs import Toy, train
from tests.support import models

ROOT = Path(__file__).parents[1]
QUICK = ["--steps", "2", "--guidance", "2"]


@pytest.fixture
def here(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a link to the toy model, and an image and a mask."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(toy.model)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save("in.png")
    mask = np.zeros((40, 48), dtype=np.uint8)
    mask[:, 24:] = 255
    Image.fromarray(mask).save("mask.png")
    return tmp_path


def sample(*arguments: str) -> int:
    return cli.main(["sample", "model", *arguments])


def read(path: str | Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def pngs(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.png"))


def refused(capfd: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line of a command that exits with 2 and writes nothing."""
    before = sorted(Path.cwd().rglob("*"))
    capfd.readouterr()
    assert sample(*arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("diffengine sample: error: ")
    assert sorted(Path.cwd().rglob("*")) == before
    return line


# ------------------------------------------------------------------------------------------------- what is written


def test_a_folder_of_images_with_what_they_were_generated_from(here: Path, capfd: pytest.CaptureFixture) -> None:
    flags = ["--n", "2", "--seed", "5", "--negative", "the pokemon", "--order", "halton", *QUICK]
    assert sample("a cat", "Yoda, in ink!", *flags, "-o", "out") == 0
    assert "wrote 4 images to out" in capfd.readouterr().out
    files = pngs("out")
    assert [path.name for path in files] == [
        "0001-a-cat-seed5.png", "0002-a-cat-seed6.png", "0003-yoda-in-ink-seed7.png", "0004-yoda-in-ink-seed8.png",
    ]  # fmt: skip
    for path, prompt, seed in zip(files, ["a cat", "a cat", "Yoda, in ink!", "Yoda, in ink!"], range(5, 9)):
        image = read(path)
        assert image.size == (32, 32)
        assert image.info.items() >= {
            "prompt": prompt, "seed": str(seed), "source": "model", "negative_prompt": "the pokemon",
            "guidance_scale": "2.0", "num_inference_steps": "2", "order": "halton", "temperature": "(2.0, 0.0)",
        }.items()  # fmt: skip
    assert len({read(path).tobytes() for path in files}) == 4


def test_an_image_equals_the_pipelines(here: Path) -> None:
    pipeline = AmusedPipeline.from_pretrained("model")
    expected = models.pipeline_image(pipeline, "a cat", 6, guidance_scale=2.0, num_inference_steps=2)
    assert sample("a dog", "a cat", "--seed", "5", *QUICK, "-o", "out") == 0
    assert read(pngs("out")[1]).tobytes() == expected.tobytes()
    plain = read(pngs("out")[1]).tobytes()
    assert sample("a dog", "a cat", "--seed", "5", *QUICK, "-o", "out", "--overwrite", "--negative", "the dog") == 0
    assert read(pngs("out")[1]).tobytes() != plain


def test_prompts_from_a_file(here: Path) -> None:
    Path("prompts.txt").write_text("a cat\n\n  ein Bär  \n", encoding="utf-8")
    assert sample("first", "--prompts", "prompts.txt", *QUICK, "-o", "out") == 0
    assert [read(path).info["prompt"] for path in pngs("out")] == ["first", "a cat", "ein Bär"]
    assert [path.name for path in pngs("out")][2] == "0003-ein-bär-seed2.png"


def test_the_default_name_is_new_each_time(here: Path, capfd: pytest.CaptureFixture) -> None:
    for name in ("sample.png", "sample-2.png", "sample-3.png"):
        assert sample("a cat", *QUICK) == 0
        assert f"wrote {name}" in capfd.readouterr().out
    before = Path("sample.png").read_bytes()
    assert before == Path("sample-2.png").read_bytes()
    assert sample("a cat", *QUICK, "--seed", "9", "--overwrite") == 0
    assert Path("sample.png").read_bytes() != before
    assert sorted(path.name for path in Path().glob("sample*")) == ["sample-2.png", "sample-3.png", "sample.png"]


def test_nothing_is_overwritten_in_silence(here: Path, capfd: pytest.CaptureFixture) -> None:
    assert sample("a cat", *QUICK, "-o", "grid.png") == 0
    assert sample("a cat", *QUICK, "-o", "out") == 0
    kept = {path: path.read_bytes() for path in (Path("grid.png"), *pngs("out"))}
    again = ["a dog", *QUICK, "-o"]
    assert "'grid.png' exists; give another --output, or --overwrite" in refused(capfd, *again, "grid.png")
    assert "'out' holds images; give another --output, or --overwrite" in refused(capfd, *again, "out")
    assert {path: path.read_bytes() for path in kept} == kept
    assert sample(*again, "grid.png", "--overwrite") == 0
    assert sample(*again, "out", "--overwrite") == 0
    assert Path("grid.png").read_bytes() != kept[Path("grid.png")]
    assert [path.name for path in pngs("out")] == ["0001-a-cat-seed0.png", "0001-a-dog-seed0.png"]


def test_labelled_grids_of_guidance_and_steps(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffengine.grids as grids

    cells: list[Any] = []
    titles: list[str] = []
    grid, stack = grids.grid, grids.stack
    monkeypatch.setattr(grids, "grid", lambda images, columns: cells.append((images, columns)) or grid(images, columns))
    monkeypatch.setattr(grids, "stack", lambda images: titles.extend(text for text, _ in images) or stack(images))
    assert sample("a cat", "a dog", "--guidance", "1", "2.5", "--steps", "1", "2", "3", "-o", "grid.png") == 0
    assert titles == ["a cat", "a dog"]
    labels = [f"guidance {scale}, {steps} steps" for scale in ("1", "2.5") for steps in (1, 2, 3)]
    for images, columns in cells:
        assert [label for label, _ in images] == labels
        assert columns == 3
        assert len({image.tobytes() for _, image in images}) == 6
    assert read("grid.png").size == stack([("", grid(images, columns)) for images, columns in cells]).size
    assert sample("a cat", "--guidance", "1", "2.5", "--steps", "1", "2", "-o", "out") == 0
    assert [path.stem for path in pngs("out")] == [
        f"0001-a-cat-seed0-guidance{scale}-steps{steps}" for scale in ("1", "2.5") for steps in (1, 2)
    ]
    assert pngs("out")[3].read_bytes() != pngs("out")[2].read_bytes()
    assert np.array_equal(read(pngs("out")[3]), cells[0][0][4][1])


def test_several_steps_without_guidance_are_labelled(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffengine.grids as grids

    labels: list[str] = []
    grid = grids.grid
    monkeypatch.setattr(
        grids, "grid", lambda images, columns: labels.extend(t for t, _ in images) or grid(images, columns)
    )
    assert sample("a cat", "--steps", "1", "2") == 0
    assert labels == ["1 steps", "2 steps"]


def test_image_to_image_and_inpainting(here: Path) -> None:
    for name, flags in (
        ("whole", ["--strength", "1"]),
        ("near", ["--image", "in.png", "--strength", "0.5"]),
        ("far", ["--image", "in.png", "--strength", "1"]),
        ("half", ["--image", "in.png"]),
        ("masked", ["--image", "in.png", "--mask", "mask.png"]),
    ):
        if name != "whole":
            assert sample("a cat", *QUICK, *flags, "-o", name) == 0
            assert read(pngs(name)[0]).size == (48, 40)
            assert read(pngs(name)[0]).info["image"] == "yes"
    assert sample("a cat", *QUICK, "--size", "48x40", "-o", "whole") == 0
    images = {name: np.asarray(read(pngs(name)[0])).astype(int) for name in ("whole", "near", "far", "half", "masked")}
    assert np.array_equal(images["far"], images["whole"])  # nothing of the image is left
    assert np.array_equal(images["near"], images["half"])
    assert read(pngs("masked")[0]).info["mask"] == "yes"
    assert "image" not in read(pngs("whole")[0]).info
    kept = open_pipeline("model")
    (round_trip,) = kept.reconstruct([read("in.png")])
    apart = np.abs(images["masked"] - np.asarray(round_trip).astype(int))
    assert 2 * apart[:, :16].mean() < apart[:, 32:].mean()  # the decoder's norms spread the change a little


def test_size(here: Path) -> None:
    assert sample("a cat", *QUICK, "--size", "24x16", "-o", "out") == 0
    assert read(pngs("out")[0]).size == (24, 16)
    assert sample("a cat", *QUICK, "--resolution", "16", "-o", "square") == 0
    assert read(pngs("square")[0]).size == (16, 16)
    assert sample("a cat", *QUICK, "--image", "in.png", "--size", "16×24", "-o", "fit") == 0
    assert read(pngs("fit")[0]).size == (16, 24)


def test_order_schedules_and_dtype_change_the_image(here: Path) -> None:
    flags = {
        "plain": [], "again": [], "halton": ["--order", "halton"], "linear": ["--masking", "linear"],
        "rising": ["--guidance-schedule", "linear"], "first half": ["--guidance-interval", "0", "0.5"],
        "cold": ["--temperature", "0", "0"], "bf16": ["--dtype", "bf16"],
    }  # fmt: skip
    images = {}
    for name, more in flags.items():
        assert sample("a cat", "--steps", "6", "--guidance", "8", *more, "-o", name) == 0
        images[name] = pngs(name)[0].read_bytes(), read(pngs(name)[0]).tobytes()
    assert images["plain"] == images["again"]
    assert len({pixels for _, pixels in images.values()}) == len(flags) - 1
    sampler = api.load_sampler("model", dtype="bf16")
    assert sampler.transformer.dtype == torch.bfloat16
    assert sampler.vqvae.dtype == torch.float32


def test_a_long_prompt_is_reported(here: Path, capfd: pytest.CaptureFixture) -> None:
    long = " ".join("x" * 62) + " the dog"
    assert sample(long, long, "a cat", *QUICK) == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "too long" in line]
    assert line.endswith("is too long: the model does not read 'the dog'")


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--guidance", "-1"], "--guidance got -1; expected a number from 0"),
        (["a", "--guidance", "2", "inf"], "--guidance got inf"),
        (["a", "--guidance", "nan"], "--guidance got nan"),
        (["a", "--steps", "1000"], "got 1000 steps for 8x8 tokens; expected at most one step per token"),
        (["a", "--steps", "4", "1000", "-o", "out"], "got 1000 steps"),
        (["a", "--steps", "4", "0"], "--steps got 0; expected at least 1"),
        (["a", "--mask", "mask.png"], "--mask got no --image"),
        (["a", "--strength", "0.5"], "--strength got no --image"),
        (["a", "--image", "in.png", "--strength", "0"], "--strength got 0.0; expected a number over 0, up to 1"),
        (["a", "--image", "in.png", "--strength", "0.01"], "strength 0.01 of 12 steps is less than one step"),
        (["a", "--size", "512"], "--size got '512'; expected WIDTHxHEIGHT, such as 512x768"),
        (["a", "--size", "0x32"], "sides divisible by 8"),
        (["a", "--size", "36x32"], "sides divisible by 8"),
        (["a", "--size", "32x32", "--resolution", "32"], "got both --size and --resolution"),
        (["a", "--image", "none.png"], "no file 'none.png'"),
        (["a", "--image", "in.png", "--mask", "none.png"], "no file 'none.png'"),
        (["a", "--image", "model/model_index.json"], "model_index.json"),
        (["--prompts", "none.txt"], "'none.txt' cannot be read: No such file"),
        (["--prompts", "in.png"], "--prompts 'in.png' is not UTF-8 text"),
        ([], "got no prompt; give some after the source, or a file with --prompts"),
        (["a", "--n", "0"], "--n got 0; expected at least 1"),
        (["a", "--seed", "-1"], "--seed got -1; expected a whole number from 0"),
        (["a", "--temperature", "-1", "0"], "temperature got (-1.0, 0.0)"),
        (["a", "--guidance-interval", "0.5", "0.2"], "guidance_interval got (0.5, 0.2)"),
        (["a", "--order", "random"], "invalid choice: 'random'"),
        (["a", "-o", "images.jpg"], "--output got 'images.jpg'; expected a file name that ends in .png, or a folder"),
        (["a", "-o", "in.png/out"], "cannot write 'in.png/out'"),
    ],
)
def test_refusals(here: Path, capfd: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    assert message in refused(capfd, *arguments)
    assert not Path("out").exists()


# ------------------------------------------------------------------------------------------ guidance by the model


def scale_of(folder: str) -> float:
    return float(read(pngs(folder)[0]).info["guidance_scale"])


def test_guidance_by_the_model(here: Path, toy: Toy) -> None:
    """1 for a model trained without caption dropout, from its checkpoint and from the pipeline that convert wrote."""
    scales = {}
    for name, dropout in (("without", 0.0), ("with", 0.1)):
        config = toy.config(name, caption_dropout=dropout)
        assert train(config, Path(name)) == 0
        assert cli.main(["convert", config, f"{name}/iter_1.pth", f"{name}-pipeline", "--pipeline"]) == 0
        images = []
        for number, source in enumerate((f"{name}/iter_1.pth", name, f"{name}-pipeline")):
            assert cli.main(["sample", source, "a cat", "--steps", "2", "-o", f"{name}{number}"]) == 0
            scales[source] = scale_of(f"{name}{number}")
            images.append(read(pngs(f"{name}{number}")[0]).tobytes())
        assert images[0] == images[1] == images[2]
    assert scales == {
        "without/iter_1.pth": 1.0, "without": 1.0, "without-pipeline": 1.0,
        "with/iter_1.pth": 2.0, "with": 2.0, "with-pipeline": 2.0,
    }  # fmt: skip
    AmusedPipeline.from_pretrained("without-pipeline")  # the scale in its index is no obstacle
    assert cli.main(["sample", "without", "a cat", "--steps", "2", "--guidance", "3", "-o", "given"]) == 0
    assert scale_of("given") == 3.0


def test_guidance_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for resolution, scale in ((256, 4.0), (512, 10.0)):
        models.make_model_folder(str(resolution), "tiny", resolution=resolution)
        flags = ["--steps", "1", "--size", "64x64", "-o", f"out-{resolution}"]
        assert cli.main(["sample", str(resolution), "a cat", *flags]) == 0
        assert scale_of(f"out-{resolution}") == scale


# ------------------------------------------------------------------------------- without the deprecated pipelines

HIDDEN = """
import sys
from importlib.abc import MetaPathFinder

class Hidden(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("diffusers.pipelines.deprecated"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Hidden())
from diffengine.cli import main

config, work_dir = sys.argv[1:]
assert main(["train", config, "--work-dir", work_dir]) == 0
assert main(["sample", work_dir, "a cat", "--steps", "2", "-o", "sampled"]) == 0
assert main(["convert", work_dir, "--pipeline"]) == 0
assert main(["convert", config, f"{work_dir}/iter_1.pth", "pipeline", "--pipeline"]) == 0
assert main(["sample", "pipeline", "a cat", "--steps", "2", "-o", "again"]) == 0
assert not any(name.startswith("diffusers.pipelines.deprecated") for name in sys.modules)
try:
    from diffusers import AmusedPipeline
except Exception:
    print("AmusedPipeline is hidden")
"""


def test_a_work_dir_says_which_checkpoint_it_takes(here: Path, toy: Toy, capsys: pytest.CaptureFixture) -> None:
    config = toy.config("two", max_iters=2, checkpoint_every=1)
    assert cli.main(["train", config, "--work-dir", "run"]) == 0
    arguments = ["a cat", "--steps", "1", "-o", "out", "--overwrite"]
    capsys.readouterr()
    assert cli.main(["sample", "run", *arguments]) == 0
    assert "generating with the newest checkpoint, 'run/iter_2.pth'\n" in capsys.readouterr().out
    Path("run/iter_1.pth").rename("run/best.pth")
    assert cli.main(["sample", "run", *arguments]) == 0
    assert "'run/iter_2.pth'; the one with the lowest validation loss: 'run/best.pth'\n" in capsys.readouterr().out
    assert cli.main(["sample", "run/best.pth", *arguments]) == 0
    assert "newest" not in capsys.readouterr().out


@pytest.mark.soak
def test_without_the_deprecated_pipelines(here: Path, toy: Toy) -> None:
    config = toy.config("hidden", prompts=["a cat"], preview_every=1, default_hooks={
        "preview": {"options": {"num_inference_steps": 2}}
    })  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", HIDDEN, config, "run"], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "AmusedPipeline is hidden" in result.stdout
    assert read("run/previews/000001.png").width >= 128
    assert checkpoint.newest(Path("run")) == Path("run/iter_1.pth")
    assert pngs("sampled")[0].read_bytes() != b""
    assert read(pngs("sampled")[0]).tobytes() == read(pngs("again")[0]).tobytes()
    lines = [line for line in result.stdout.splitlines() if "every component was loaded back" in line]
    assert len(lines) == 2
    assert "but not the pipeline: diffusers" in lines[0]
    assert "has no AmusedPipeline; generate with `diffengine sample`" in lines[0]
    pipeline = AmusedPipeline.from_pretrained("pipeline")  # it is whole all the same
    scale = open_pipeline("pipeline").guidance_scale
    expected = models.pipeline_image(pipeline, "a cat", 0, guidance_scale=scale, num_inference_steps=2)
    assert read(pngs("sampled")[0]).tobytes() == expected.tobytes()
