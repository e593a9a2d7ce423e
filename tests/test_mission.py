"""Fine-tuning as in the README: train, convert, and load in diffusers, each in a separate process.

The hub is a local cache. `amused/amused-512` is a model with the released topology at tiny widths, and
`reach-vb/pokemon-blip-captions` has eight real photos, so an epoch is one step of batch size 8 at 512 px.
"""

import json
import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.support import hub, models

PROGRAM = Path(sys.executable).with_name("diffengine")
RUN = "work_dirs/amused_512_pokemon_blip"

SNIPPET = textwrap.dedent(
    """
    import torch
    from diffusers import AmusedPipeline, UVit2DModel

    transformer = UVit2DModel.from_pretrained("work_dirs/amused_512_pokemon_blip", subfolder="transformer")
    pipe = AmusedPipeline.from_pretrained("amused/amused-512", transformer=transformer)
    image = pipe("yoda pokemon", generator=torch.Generator().manual_seed(0)).images[0]
    image.save("yoda.png")
    """
)

CHECKS = textwrap.dedent(
    """
    import json
    from PIL import Image
    from diffusers import AmusedImg2ImgPipeline, AmusedInpaintPipeline

    report = {"size": image.size, "colours": len(image.getcolors(1 << 24))}
    base = UVit2DModel.from_pretrained("amused/amused-512", subfolder="transformer").state_dict()
    trained = transformer.state_dict()
    report["moved"] = sum(not torch.equal(base[name], trained[name]) for name in base)
    report["tensors"] = len(base)
    mask = Image.new("L", (512, 512), 0)
    mask.paste(255, (0, 0, 256, 512))
    load = dict(transformer=transformer)
    for pipeline_class, given in ((AmusedImg2ImgPipeline, [image]), (AmusedInpaintPipeline, [image, mask])):
        other = pipeline_class.from_pretrained("amused/amused-512", **load)
        generated = other("a cat", *given, num_inference_steps=2).images[0]
        report[pipeline_class.__name__] = generated.size
    for name in ("enable_model_cpu_offload", "enable_xformers_memory_efficient_attention"):
        try:
            getattr(pipe, name)()
            report[name] = pipe("a cat", num_inference_steps=1).images[0].size
        except (ImportError, ModuleNotFoundError, RuntimeError, ValueError) as error:
            report[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(report))
    """
)


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("hub")
    variables = hub.make_hub_cache(
        root / "cache",
        models={"amused/amused-512": models.make_model_folder(root / "model", "tiny")},
        datasets={"reach-vb/pokemon-blip-captions": hub.photo_rows(8, 512)},
    )
    return {**os.environ, **variables, "OMP_NUM_THREADS": "1"}


def run(command: str, cwd: Path, env: dict[str, str]) -> str:
    """The output of a command line, which must succeed."""
    argv = shlex.split(command)
    assert argv[0] == "diffengine"
    done = subprocess.run([str(PROGRAM), *argv[1:]], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def fine_tune(cwd: Path, env: dict[str, str], epochs: int, extra: str = "") -> dict[str, Any]:
    run(f"diffengine train amused_512_pokemon_blip{extra}", cwd, env)
    assert (cwd / RUN / f"epoch_{epochs}.pth").is_file()
    output = run(
        f"diffengine convert amused_512_pokemon_blip {RUN}/epoch_{epochs}.pth {RUN} --save-keys transformer",
        cwd,
        env,
    )
    assert f"UVit2DModel.from_pretrained('{RUN}', subfolder='transformer')" in output
    done = subprocess.run([sys.executable, "-c", SNIPPET + CHECKS], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (cwd / "yoda.png").is_file()
    return json.loads(done.stdout.splitlines()[-1])


def check(report: dict[str, Any]) -> None:
    print(report)  # pytest shows it if an assertion fails
    assert report["size"] == [512, 512]
    assert report["colours"] > 1000
    assert report["moved"] == report["tensors"]  # the export is not the base model
    assert report["AmusedImg2ImgPipeline"] == report["AmusedInpaintPipeline"] == [512, 512]
    # Each works, or its error names what is missing.
    offload, xformers = report["enable_model_cpu_offload"], report["enable_xformers_memory_efficient_attention"]
    assert offload == [512, 512] or "requires accelerator" in offload
    assert xformers == [512, 512] or "install xformers" in xformers or "GPU" in xformers


def test_fine_tuning(tmp_path: Path, env: dict[str, str]) -> None:
    """Two epochs, and one preview before and after, without validation. The soak test trains the config unchanged."""
    options = """max_epochs=2 preview_every=None validation_every=0 'prompts=["yoda pokemon"]'"""
    check(fine_tune(tmp_path, env, 2, f" --cfg-options {options}"))
    assert sorted(path.name for path in (tmp_path / RUN).glob("*.pth")) == ["epoch_1.pth", "epoch_2.pth"]
    assert (tmp_path / RUN / "before_after.png").is_file()


@pytest.mark.soak
def test_fine_tuning_with_the_shipped_config(tmp_path: Path, env: dict[str, str]) -> None:
    check(fine_tune(tmp_path, env, 50))
    kept = sorted(path.name for path in (tmp_path / RUN).glob("*.pth"))
    assert kept == ["epoch_48.pth", "epoch_49.pth", "epoch_50.pth"]
    assert len(list((tmp_path / RUN / "previews").glob("0*.png"))) == 51
