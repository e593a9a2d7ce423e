"""Runs over images of several shapes: exact however a step is split, resumed, and cached."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffengine import distributed
from diffengine.datasets import PositionSampler, collate
from diffengine.engine.build import load_config, make_job
from diffengine.engine.check import check
from tests.engine import runs
from tests.engine.runs import WITH_TEXT_ENCODER, FirstStep, Toy
from tests.support.photos import captioned_photos

SIZES = [(40, 40), (64, 40), (40, 64), (70, 35), (33, 66), (48, 36)]
KEEP: dict[str, Any] = {"aspect": "keep", "flip": 0.5}
TOLERANCE = 1e-5  # relative to the norm of the gradients


@pytest.fixture(scope="module")
def shaped(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The toy model, and twelve photos of six sizes."""
    root = tmp_path_factory.mktemp("shaped")
    (root / "data").mkdir()
    for number, (name, image, caption) in enumerate(captioned_photos(12, 70)):
        stem = Path(name).stem
        image.resize(SIZES[number % len(SIZES)]).save(root / "data" / f"{stem}.png")
        (root / "data" / f"{stem}.txt").write_text(caption)
    return replace(toy, data=root / "data", root=root)


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def gradients(grads: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([grad.flatten() for grad in grads])


def assert_near(one: torch.Tensor, other: torch.Tensor) -> None:
    assert float((one - other).norm()) <= TOLERANCE * float(one.norm())


@pytest.fixture(scope="module")
def whole(shaped: Toy) -> FirstStep:
    return runs.first_step(shaped.config("whole", batch_size=8, **KEEP), shaped.root / "whole", WITH_TEXT_ENCODER)


def test_a_step_of_several_shapes_has_the_gradients_of_its_images(shaped: Toy, whole: FirstStep) -> None:
    run = runs.build(shaped.config("singly", batch_size=8, **KEEP), shaped.root / "singly", WITH_TEXT_ENCODER)
    model, stream = run.trainable.eval(), run.train_loop.stream
    samples = [stream[position] for position in next(iter(PositionSampler(8)))]
    assert len({sample["image"].shape for sample in samples}) > 2
    parameters = run.optim_wrapper.parameters
    total, loss = torch.zeros(()), 0.0
    for sample in samples:
        with torch.no_grad():
            prepared = model.prepare(collate([sample]))
        summed, _ = model(prepared)
        total = total + gradients(list(torch.autograd.grad(summed, parameters)))
        loss += summed.item()
    targets = sum(sample["num_targets"] for sample in samples)
    assert targets == whole.targets
    assert loss / targets == pytest.approx(whole.loss, rel=1e-6)
    clipped = gradients(whole.grads)
    assert_near(total / total.norm(), clipped / clipped.norm())
    assert float(total.double().norm()) / targets == pytest.approx(whole.details["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("micro", [pytest.param(4, marks=pytest.mark.soak), 1])
def test_micro_batches_take_the_same_step(shaped: Toy, whole: FirstStep, tmp_path: Path, micro: int) -> None:
    path = shaped.config("micro", batch_size=8, micro_batch_size=micro, **KEEP)
    step = runs.first_step(path, tmp_path, WITH_TEXT_ENCODER)
    assert step.masked == whole.masked
    assert step.loss == pytest.approx(whole.loss, rel=1e-6)
    assert_near(gradients(step.grads), gradients(whole.grads))


def _train_on_rank(shaped: Toy, out: Path) -> None:
    rank = distributed.rank()
    step = runs.first_step(shaped.config(f"ranks{rank}", batch_size=8, **KEEP), out / "ranks", WITH_TEXT_ENCODER)
    torch.save(vars(step), out / f"rank{rank}.pt")


def test_ranks_take_the_same_step(shaped: Toy, whole: FirstStep, tmp_path: Path) -> None:
    runs.on_ranks(2, _train_on_rank, shaped, tmp_path)
    ranks = [FirstStep(**torch.load(tmp_path / f"rank{rank}.pt")) for rank in (0, 1)]
    assert ranks[0].masked + ranks[1].masked == whole.masked
    assert ranks[0].targets + ranks[1].targets == whole.targets
    assert ranks[0].loss == pytest.approx(whole.loss, rel=1e-6)
    for rank in ranks:
        assert_near(gradients(rank.grads), gradients(whole.grads))


LONG = {**KEEP, "max_iters": 8, "checkpoint_every": 4, "keep_checkpoints": 2, "learning_rate": 1e-3}
TEXT = ("--cfg-options", WITH_TEXT_ENCODER)  # runs at each step, so that a cache changes no bit


@pytest.fixture(scope="module")
def online(shaped: Toy) -> Path:
    work_dir = shaped.root / "online"
    assert runs.train(shaped.config("online", image_variations=2, cache=False, **LONG), work_dir, *TEXT) == 0
    return work_dir


def test_cached_equals_online_and_so_does_a_resumed_run(shaped: Toy, online: Path, tmp_path: Path, capsys: Any) -> None:
    path = shaped.config("cached", image_variations=2, cache=True, cache_path=str(tmp_path / "cache"), **LONG)
    assert runs.train(path, tmp_path / "cached", *TEXT) == 0
    assert runs.results(tmp_path / "cached") == runs.results(online)
    runs.assert_equal_checkpoints(tmp_path / "cached" / "iter_8.pth", online / "iter_8.pth")
    (tmp_path / "cached" / "iter_8.pth").unlink()
    assert runs.train(path, tmp_path / "cached", "--resume", *TEXT) == 0
    runs.assert_equal_checkpoints(tmp_path / "cached" / "iter_8.pth", online / "iter_8.pth")
    # The copied cache is enough, and keeps the order by shape.
    alone = replace(shaped, data=tmp_path / "absent", root=tmp_path)
    path = alone.config("alone", image_variations=2, cache=True, cache_path=str(tmp_path / "cache"), **LONG)
    assert runs.train(path, tmp_path / "alone", *TEXT) == 0
    runs.assert_equal_checkpoints(tmp_path / "alone" / "iter_8.pth", online / "iter_8.pth")
    # Another limit of the ratio gives other rows.
    changed = shaped.config("changed", image_variations=2, cache=True, cache_path=str(tmp_path / "cache"),
                            **{**LONG, "max_aspect": 1.5, "max_iters": 1})  # fmt: skip
    assert runs.train(changed, tmp_path / "changed", *TEXT) == 0
    assert "changed since it was built: shapes" in capsys.readouterr().out


def test_previews_and_validation_keep_shapes(shaped: Toy, tmp_path: Path) -> None:
    settings = {**KEEP, "prompts": 3, "validation_every": 1, "validation_data": str(shaped.data), "batch_size": 4}
    options = {"options": {"num_inference_steps": 1, "guidance_scale": 1.0}}
    path = shaped.config("shown", default_hooks={"report": None, "preview": {**options, "resolution": 32}}, **settings)
    assert runs.train(path, tmp_path) == 0
    sizes = []
    for number in range(3):
        names = [
            tmp_path / "previews" / folder / f"{number:02}.webp" for folder in ("000001", "original", "round_trip")
        ]
        generated, original, round_trip = map(size_of, names)
        assert generated == original == round_trip
        sizes.append(generated)
    assert len(set(sizes)) > 1
    assert runs.metrics(tmp_path)[0]["val/loss"] > 0


def test_check_takes_steps_of_one_shape(shaped: Toy, tmp_path: Path) -> None:
    path = shaped.config("checked", batch_size=4, max_iters=20, image_variations=2, **KEEP)
    report = check(make_job(path, *load_config(path), runs.CPU))
    assert (report.images, report.images_at_once) == (12, 4)
    assert isinstance(report.cache, dict)
    assert report.cache["rows"] == 24
