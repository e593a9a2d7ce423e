"""The commands from Python: `diffengine.train` and the others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UVit2DModel

import diffengine
from diffengine import api
from diffengine.engine.run import Run
from diffengine.errors import UserError
from tests.engine.runs import Toy, metrics
from tests.support import models

PROMPTS = ["a cat", "a dog"]
SAMPLED = {"seed": 7, "resolution": 32, "guidance": 10.0, "steps": 2}
STEPS = {"max_iters": 2, "checkpoint_every": 1, "batch_size": 2}


@pytest.fixture(scope="module")
def run(toy: Toy) -> Run:
    """A run of two steps of two images."""
    return diffengine.train(toy.config("api"), work_dir=toy.root / "api", **STEPS)


@pytest.fixture(scope="module")
def images(run: Run) -> list[bytes]:
    """What the trained model generates for the prompts."""
    return generated(run.pipeline())


def generated(pipeline: Any) -> list[bytes]:
    options = {"guidance_scale": 10.0, "num_inference_steps": 2}
    return [
        models.pipeline_image(pipeline, prompt, 7 + index, 32, **options).tobytes()
        for index, prompt in enumerate(PROMPTS)
    ]


def sampled(source: Path, **options: Any) -> list[bytes]:
    return [image.tobytes() for image in diffengine.sample(source, PROMPTS, **SAMPLED, **options)]


def test_a_finished_run(toy: Toy, run: Run) -> None:
    assert run.work_dir == toy.root / "api"
    assert run.metrics == metrics(run.work_dir)
    assert [line["iter"] for line in run.metrics] == [1, 2]
    assert run.checkpoints == [run.work_dir / "iter_1.pth", run.work_dir / "iter_2.pth"]
    assert run.config["batch_size"] == run.train_loop.batch_size == 2


def test_its_pipeline_generates(run: Run) -> None:
    image = run.pipeline()("a cat", num_inference_steps=1, height=32, width=32).images[0]
    assert image.size == (32, 32)


def test_sections_merge(toy: Toy, tmp_path: Path, run: Run) -> None:
    model = {"mask_schedule": "linear"}
    linear = diffengine.train(toy.config("api"), work_dir=tmp_path / "run", **{**STEPS, "max_iters": 1}, model=model)
    assert linear.config["model"] == {**run.config["model"], **model}
    assert run.config["model"].get("mask_schedule") != "linear"
    assert linear.metrics[0]["loss"] != run.metrics[0]["loss"]


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"batchsize": 4}, "config '.*api.py' has no setting 'batchsize'; it has .*batch_size"),
        ({"batch_size": 2.5}, r"train_dataloader.batch_size got 2.5 \(float\); expected int"),
        ({"model": {"mask_shedule": "linear"}}, "unknown key 'mask_shedule' .*; did you mean 'mask_schedule'"),
        ({"data": Path("no/such/folder")}, "no file or folder 'no/such/folder'"),
        ({"data": b"photos"}, "config '.*api.py' holds more than plain values .*: got b'photos' of bytes"),
        ({"data": "no/such/folder"}, "no file or folder 'no/such/folder'"),
        ({"work_dir": "api"}, "'api' holds a run"),
    ],
)
def test_a_mistake_is_raised_not_printed(
    run: Run, toy: Toy, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, settings: dict, answer: str
) -> None:
    monkeypatch.chdir(run.work_dir.parent)
    capfd.readouterr()
    with pytest.raises(diffengine.UserError, match=answer):
        diffengine.train(toy.config("api"), **{"work_dir": "new", **STEPS, **settings})
    assert capfd.readouterr() == ("", "")


def test_overwrite_and_resume(toy: Toy, tmp_path: Path) -> None:
    settings = {**STEPS, "work_dir": tmp_path / "run"}
    first = diffengine.train(toy.config("api"), **settings)
    again = diffengine.train(toy.config("api"), overwrite=True, **settings)
    again.checkpoints[1].unlink()
    resumed = diffengine.train(toy.config("api"), resume="newest", **settings)
    for other in (again, resumed):
        assert [line["loss"] for line in other.metrics] == [line["loss"] for line in first.metrics]


def test_convert(run: Run, tmp_path: Path) -> None:
    (exported,) = diffengine.convert(run.checkpoints[-1], tmp_path)
    assert exported.folder == tmp_path / "transformer"
    assert exported.difference == 0
    whole = UVit2DModel.from_pretrained(tmp_path, subfolder="transformer").state_dict()
    trained = run.trainable.exportable["transformer"].state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in whole.items())
    for options, answer in (
        ({"keys": ["vqvae"]}, "this model trains transformer"),
        ({"dtype": "int8"}, "dtype got 'int8'; expected one of fp32, fp16, bf16"),
        ({"pipeline": True, "keys": ["transformer"]}, "leave out --save-keys"),
        ({"pipeline": True, "merge": True}, "leave out --merge"),
    ):
        with pytest.raises(diffengine.UserError, match=answer):
            diffengine.convert(run.checkpoints[-1], tmp_path / "other", **options)


def test_sample(run: Run, toy: Toy, tmp_path: Path, images: list[bytes]) -> None:
    """From the work dir, a checkpoint, a pipeline folder, and components on their base."""
    diffengine.convert(run.checkpoints[-1], tmp_path / "whole", pipeline=True)
    diffengine.convert(run.checkpoints[-1], tmp_path / "components")
    for source in (run.work_dir, run.checkpoints[-1], tmp_path / "whole"):
        assert sampled(source) == images
    for source in (tmp_path / "components", tmp_path / "components" / "transformer"):
        assert sampled(source, base=str(toy.model)) == images
    assert sampled(toy.model) != images


def test_check_and_cache(toy: Toy, tmp_path: Path) -> None:
    path = toy.config("cached", image_variations=3, max_iters=30)
    settings = {"work_dir": tmp_path / "run", "batch_size": 5}
    report = diffengine.check(path, **settings)
    assert (report.images, report.clock.batch_size, report.clock.max_iters) == (10, 5, 30)
    assert report.cache["exists"] is False
    assert list(tmp_path.iterdir()) == []
    diffengine.build_cache(path, **settings)
    assert diffengine.check(path, **settings).cache["exists"] is True
    assert not (tmp_path / "run").exists()
    with pytest.raises(diffengine.UserError, match="trains without a token cache"):
        diffengine.build_cache(path, cache=False, **settings)


def test_the_package_offers_them(run: Run) -> None:
    """And no others."""
    assert all(callable(getattr(diffengine, name)) for name in diffengine.__all__)
    assert set(diffengine.__all__) == {
        "UserError",
        "build_cache",
        "check",
        "convert",
        "evaluate",
        "inspect_data",
        "sample",
        "train",
    }
    with pytest.raises(AttributeError, match="has no attribute 'load'"):
        _ = diffengine.load


def test_a_text_is_no_list_of_texts(toy: Toy) -> None:
    with pytest.raises(UserError, match=r"^prompts got the text 'a cat'; expected a list of texts$"):
        diffengine.sample(toy.model, "a cat")
    with pytest.raises(UserError, match=r"^sources got 'model'; expected a list of at least one$"):
        api.evaluate("model", prompts=["a cat"])
    with pytest.raises(UserError, match=r"^prompts got \[\]; expected a list of at least one$"):
        api.evaluate([toy.model], prompts=[])
