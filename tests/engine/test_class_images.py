"""What a data set lacks is drawn by the base model before training, once, and nothing else is touched."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffengine import distributed
from diffengine.errors import UserError
from diffengine.models.amused import AmusedModel
from diffengine.models.generation import generate
from tests.engine import runs
from tests.engine.runs import Toy, in_child, train

PROMPT = "a photo of a cat"


def _config(toy: Toy, name: str, folder: Path, count: int, **settings: Any) -> str:
    dataset = {
        "type": "diffengine.datasets.SubjectDataset", "data": "${data}", "class_data": str(folder),
        "instance_prompt": "sks", "class_prompt": PROMPT, "num_class_images": count,
        "class_drawing": {"num_inference_steps": 2, "guidance_scale": 2.0},
    }  # fmt: skip
    return toy.config(name, train_dataloader={"dataset": dataset}, **settings)


def _killed_at(number: int, path: str, work_dir: Path) -> int:
    """A run that is killed when it has drawn this image and not yet written it."""
    preview = AmusedModel.preview

    def killing(model: AmusedModel, request: Any) -> Any:
        images = preview(model, request)
        if request.seed == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return images

    AmusedModel.preview = killing  # type: ignore[method-assign]
    return train(path, work_dir)


def test_missing_images_are_drawn_once(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (50, 40), "red").save(folder / "000001.png")
    Image.new("RGB", (50, 40), "red").save(folder / "mine.jpg")
    kept = {name: (folder / name).read_bytes() for name in ("000001.png", "mine.jpg")}
    path = _config(toy, "drawn", folder, 6)
    assert in_child(_killed_at, 3, path, tmp_path / "run") == -signal.SIGKILL
    assert {file.name for file in folder.iterdir()} == {*kept, "000000.png", "000002.png", "drawn.json"}
    assert not list((tmp_path / "run").iterdir())  # nothing was written before
    (folder / ".000003.png.tmp").write_bytes(b"what a kill in the middle of writing leaves")
    drawn = {name: (folder / name).stat().st_mtime_ns for name in ("000000.png", "000002.png")}

    assert train(path, tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert f"lacks 2 class images: generating '{PROMPT}' before training" in said
    assert "generated 2/2 class images" in said
    assert {file.name for file in folder.iterdir()} == {
        *kept,
        *drawn,
        "000003.png",
        "000004.png",
        "drawn.json",
    }
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    assert {name: (folder / name).stat().st_mtime_ns for name in drawn} == drawn

    base = runs.build(toy.config("base"), tmp_path / "base").trainable.build_pipeline()
    for number in (0, 2, 3, 4):  # with the weights from before training
        expected = generate(base, PROMPT, number, num_inference_steps=2, guidance_scale=2.0)
        with Image.open(folder / f"{number:06}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    assert train(path, tmp_path / "run", "--overwrite") == 0
    assert "lacks" not in capsys.readouterr().out
    made = json.loads((folder / "drawn.json").read_text())
    assert (made["prompt"], made["base"]) == (PROMPT, str(toy.model))
    assert made["pictures"] == ["000000.png", "000002.png", "000003.png", "000004.png"]
    twin = shutil.copytree(toy.model, tmp_path / "twin")
    assert train(path, tmp_path / "run", "--overwrite", "--pretrained", str(twin)) == 2
    said = capsys.readouterr().err
    assert f"4 class images that were generated differently: base was '{toy.model}' and is '{twin}'; " in said


def test_drawing_does_not_change_training(toy: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    path = _config(toy, "first", folder, 3)
    one = runs.first_step(path, tmp_path / "one")
    other = runs.first_step(path, tmp_path / "other")  # the images are there
    assert one.masked == other.masked
    assert one.loss == other.loss


def test_models_that_cannot_draw(toy: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    path = _config(toy, "learns", folder, 2, model=_from_nothing(toy))
    with pytest.raises(UserError, match=r"lacks 2 class images, and the model, which is built from scratch"):
        runs.build(path, tmp_path / "run")
    text = Path(toy.vq_config("vq_class", 1, 1)).read_text()
    wanted = f"dataset=dict(type=SubjectDataset, data={str(toy.data)!r}, instance_prompt='sks', " + (
        f"class_data={str(folder)!r}, class_prompt='cat'),"
    )
    vq = toy.root / "vq_class.py"
    vq.write_text(
        text.replace(f"dataset=dict(type=ImageTextDataset, path={str(toy.data)!r}),", wanted).replace(
            "ImageTextDataset", "SubjectDataset"
        )
    )
    with pytest.raises(UserError, match="lacks 100 class images, and the model, which generates nothing from text"):
        runs.build(str(vq), tmp_path / "run")
    assert not folder.exists()


def _from_nothing(toy: Toy) -> dict[str, Any]:
    return {
        "type": "diffengine.models.amused.AmusedModel",
        "vqvae": str(toy.model / "vqvae"),
        "train": ["transformer", "text_encoder"],
        "tokenizer": {"vocab_size": 520, "max_length": 16},
        "text_encoder": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        },
        "transformer": {
            "hidden_size": 32, "cond_embed_dim": 32, "micro_cond_encode_dim": 16, "micro_cond_embed_dim": 80,
            "in_channels": 32, "block_out_channels": 32, "num_res_blocks": 1, "block_num_heads": 2,
            "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "sample_size": 8,
        },
    }  # fmt: skip


def test_a_folder_that_cannot_be_written(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = _config(toy, "unwritten", tmp_path / "file" / "class", 2)
    with pytest.raises(UserError, match=r"cannot keep class images in '.*class'"):
        runs.build(path, tmp_path / "run")


def _two(toy: Toy, folder: Path, work_dir: Path) -> None:
    seen = []
    preview = AmusedModel.preview
    AmusedModel.preview = lambda model, request: seen.append(request.seed) or preview(model, request)  # type: ignore
    runs.build(_config(toy, f"two{distributed.rank()}", folder, 2, batch_size=4), work_dir).train()
    assert seen == ([0, 1] if distributed.rank() == 0 else [])


def test_one_rank_draws_and_the_other_waits(toy: Toy, tmp_path: Path) -> None:
    runs.on_ranks(2, _two, toy, tmp_path / "class", tmp_path / "run")
    assert {file.name for file in (tmp_path / "class").iterdir()} == {
        "000000.png",
        "000001.png",
        "drawn.json",
    }
