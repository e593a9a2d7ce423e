"""Before training, the base model generates the missing class images, once."""

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
from diffengine.engine import class_images
from diffengine.errors import UserError
from diffengine.models.amused import AmusedModel
from tests.engine import runs
from tests.engine.runs import Toy, in_child, train
from tests.support import models

PROMPT = "a photo of a cat"


def class_config(toy: Toy, name: str, folder: Path, count: int, **settings: Any) -> str:
    dataset = {
        "type": "diffengine.datasets.SubjectDataset", "data": "${data}", "class_data": str(folder),
        "instance_prompt": "sks", "class_prompt": PROMPT, "num_class_images": count,
        "class_drawing": {"num_inference_steps": 2, "guidance_scale": 2.0},
    }  # fmt: skip
    return toy.config(name, train_dataloader={"dataset": dataset}, **settings)


def _train_and_die(number: int, path: str, work_dir: Path) -> int:
    """Start a run, with batches of two, that dies when the batch from `number` on is generated but not written."""
    class_images.BATCH = 2
    preview = AmusedModel.preview

    def preview_and_die(model: AmusedModel, request: Any) -> Any:
        images = preview(model, request)
        if request.seed == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return images

    AmusedModel.preview = preview_and_die  # type: ignore[method-assign]
    return train(path, work_dir)


def test_missing_images_are_generated_once(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (50, 40), "red").save(folder / "000001.png")
    Image.new("RGB", (50, 40), "red").save(folder / "mine.jpg")
    kept = {name: (folder / name).read_bytes() for name in ("000001.png", "mine.jpg")}
    path = class_config(toy, "generated", folder, 6)
    assert in_child(_train_and_die, 4, path, tmp_path / "run") == -signal.SIGKILL
    assert {file.name for file in folder.iterdir()} == {*kept, "000000.png", "000002.png", "000003.png", "drawn.json"}
    assert not list((tmp_path / "run").iterdir())  # the run itself has written nothing yet
    (folder / ".000004.png.tmp").write_bytes(b"left by a kill during a write")
    generated = {name: (folder / name).stat().st_mtime_ns for name in ("000000.png", "000002.png", "000003.png")}

    assert train(path, tmp_path / "run") == 0
    output = capsys.readouterr().out
    assert f"lacks 1 class images: generating '{PROMPT}' before training" in output
    assert "generated 1/1 class images" in output
    assert {file.name for file in folder.iterdir()} == {
        *kept,
        *generated,
        "000004.png",
        "drawn.json",
    }
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    assert {name: (folder / name).stat().st_mtime_ns for name in generated} == generated

    pipeline = runs.build(toy.config("base"), tmp_path / "base").trainable.build_pipeline()
    for number in (0, 2, 3, 4):  # by the weights before training
        expected = models.pipeline_image(pipeline, PROMPT, number, num_inference_steps=2, guidance_scale=2.0)
        with Image.open(folder / f"{number:06}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    assert train(path, tmp_path / "run", "--overwrite") == 0
    assert "lacks" not in capsys.readouterr().out
    record = json.loads((folder / "drawn.json").read_text())
    assert (record["prompt"], record["base"]) == (PROMPT, str(toy.model))
    assert record["pictures"] == ["000000.png", "000002.png", "000003.png", "000004.png"]
    copy = shutil.copytree(toy.model, tmp_path / "copy")
    assert train(path, tmp_path / "run", "--overwrite", "--pretrained", str(copy)) == 2
    error = capsys.readouterr().err
    assert f"4 class images that were generated differently: base was '{toy.model}' and is '{copy}'; " in error


def test_generating_images_does_not_change_training(toy: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    path = class_config(toy, "first", folder, 3)
    one = runs.first_step(path, tmp_path / "one")
    other = runs.first_step(path, tmp_path / "other")  # the images exist already
    assert one.masked == other.masked
    assert one.loss == other.loss


def test_models_that_cannot_generate(toy: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    path = class_config(toy, "learns", folder, 2, model=scratch_model(toy))
    with pytest.raises(UserError, match=r"lacks 2 class images, and the model, which is built from scratch"):
        runs.build(path, tmp_path / "run")
    text = Path(toy.vq_config("vq_class", 1, 1)).read_text()
    dataset = f"dataset=dict(type=SubjectDataset, data={str(toy.data)!r}, instance_prompt='sks', " + (
        f"class_data={str(folder)!r}, class_prompt='cat'),"
    )
    vq = toy.root / "vq_class.py"
    vq.write_text(
        text.replace(f"dataset=dict(type=ImageTextDataset, path={str(toy.data)!r}),", dataset).replace(
            "ImageTextDataset", "SubjectDataset"
        )
    )
    with pytest.raises(UserError, match="lacks 100 class images, and the model, which generates nothing from text"):
        runs.build(str(vq), tmp_path / "run")
    assert not folder.exists()


def scratch_model(toy: Toy) -> dict[str, Any]:
    """The `model` section of a model that is trained from scratch."""
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


def test_a_class_folder_that_cannot_be_written_is_reported(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = class_config(toy, "unwritten", tmp_path / "file" / "class", 2)
    with pytest.raises(UserError, match=r"cannot keep class images in '.*class'"):
        runs.build(path, tmp_path / "run")


def _generate_on_rank(toy: Toy, folder: Path, work_dir: Path) -> None:
    numbers = []
    preview = AmusedModel.preview
    AmusedModel.preview = lambda model, request: numbers.append(request.seed) or preview(model, request)  # type: ignore
    runs.build(class_config(toy, f"two{distributed.rank()}", folder, 2, batch_size=4), work_dir).train()
    assert numbers == ([0] if distributed.rank() == 0 else [])  # one batch


def test_one_rank_generates_and_the_other_waits(toy: Toy, tmp_path: Path) -> None:
    runs.on_ranks(2, _generate_on_rank, toy, tmp_path / "class", tmp_path / "run")
    assert {file.name for file in (tmp_path / "class").iterdir()} == {
        "000000.png",
        "000001.png",
        "drawn.json",
    }
