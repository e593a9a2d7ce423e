"""With masks the loss is sum_ij m_ij ce_ij / sum_ij m_ij: however a step is split, online and from the cache."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffengine import distributed
from diffengine.datasets import ImageTextDataset
from diffengine.engine.facts import data_at_a_glance
from diffengine.engine.loop import count_targets, targets_by
from diffengine.errors import UserError
from tests.engine import runs
from tests.engine.runs import FirstStep, Toy, metrics, train
from tests.engine.test_split import assert_same_step

U = 0.2


@pytest.fixture(scope="module")
def data(toy: Toy) -> Path:
    """The photos; every image but each third has a mask, whose blocks of 10 px are of any grey."""
    folder = toy.root / "masked"
    shutil.copytree(toy.data, folder)
    rng = np.random.default_rng(0)
    for index, file in enumerate(ImageTextDataset(str(folder)).files()):
        if index % 3:
            with Image.open(file) as image:
                blocks = Image.fromarray(rng.choice([0, 0, 100, 255], (4, 4)).astype(np.uint8))
                blocks.resize(image.size, Image.Resampling.NEAREST).save(file.with_suffix(".mask.png"))
    return folder


def _config(toy: Toy, name: str, data: Path, **settings: Any) -> str:
    return toy.config(name, **{"batch_size": 8, "data": str(data), "unmasked_weight": U, **settings})


@pytest.fixture(scope="module")
def whole(toy: Toy, data: Path) -> FirstStep:
    """The first step of a run that does not split it."""
    return runs.first_step(_config(toy, "regions", data), toy.root / "regions")


def weights_of(sample: dict[str, Any]) -> torch.Tensor:
    return torch.from_numpy(sample["target_weights"]).double()


@torch.no_grad()
def cross_entropies(model: Any, sample: dict[str, Any]) -> torch.Tensor:
    """Of a sample's masked tokens, by the whole transformer."""
    ids = model.tokenize(sample["image"][None])["token_ids"].long().flatten()
    chosen = torch.from_numpy(sample["masked"])
    hidden, pooled = model.encode_text(model.preprocessor.text_ids([sample["text"]]))
    masked = ids.index_fill(0, chosen, model.mask_id).view(1, 8, 8)
    logits = model.module("transformer")(masked, hidden, pooled, sample["micro_conds"][None])[0].flatten(1).T
    return F.cross_entropy(logits[chosen], ids[chosen], reduction="none").double()


def test_the_loss_follows_its_formula(toy: Toy, data: Path, whole: FirstStep, tmp_path: Path) -> None:
    """Each token's loss is that of the untrained model without weights; its weight comes from the mask's pixels."""
    runner = runs.build(_config(toy, "formula", data, random_crop=False, flip=0.0), tmp_path / "a")
    stream, model = runner.train_loop.stream, runner.trainable
    weighted = total = 0.0
    for position in range(8):
        sample = stream[position]
        index = stream.locate(position)[1]
        raw = stream.dataset[index]
        shares = np.ones((8, 8))
        if "mask" in raw:
            cropped = np.asarray(raw["mask"].resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=3.0)) / 255
            shares = cropped.reshape(8, 4, 8, 4).mean(axis=(1, 3))
        weights = (U + (1 - U) * shares).ravel()[sample["masked"]]
        assert sample["target_weights"] == pytest.approx(weights, abs=0.8 / 510 + 1e-6)
        assert sample["num_targets"] == pytest.approx(weights.sum(), rel=0.01)
        weighted += float((weights_of(sample) * cross_entropies(model, sample)).sum())
        total += float(weights_of(sample).sum())
    step = runs.first_step(_config(toy, "formula", data, random_crop=False, flip=0.0), tmp_path / "b")
    assert step.targets == total
    assert step.loss == pytest.approx(weighted / total, rel=1e-5)
    assert {"mask" in stream.dataset[index] for index in range(10)} == {True, False}


def test_micro_batches_take_the_same_step(toy: Toy, data: Path, whole: FirstStep, tmp_path: Path) -> None:
    assert_same_step(whole, runs.first_step(_config(toy, "micro_regions", data, micro_batch_size=1), tmp_path))
    plain = runs.first_step(_config(toy, "ignored", data, unmasked_weight=1.0), tmp_path / "ignored")
    assert abs(plain.loss / whole.loss - 1) > 1e-4


def _train_on_rank(toy: Toy, data: Path, out: Path) -> None:
    step = runs.first_step(_config(toy, f"regions{distributed.rank()}", data), out / "run")
    torch.save(vars(step), out / f"rank{distributed.rank()}.pt")


def test_two_processes_take_the_same_step(toy: Toy, data: Path, whole: FirstStep, tmp_path: Path) -> None:
    runs.on_ranks(2, _train_on_rank, toy, data, tmp_path)
    first, second = (FirstStep(**torch.load(tmp_path / f"rank{rank}.pt")) for rank in range(2))
    assert first.targets + second.targets == whole.targets  # the sums of weights are exact
    assert_same_step(whole, FirstStep(first.grads, first.masked + second.masked, 0, 0, first.loss, first.details))


def test_cached_regions_equal_those_of_each_step(toy: Toy, data: Path, tmp_path: Path) -> None:
    """Also with another weight of the black, for which no image is encoded again."""
    settings = {"image_variations": 3, "max_iters": 30, "cache_path": str(tmp_path / "cache")}
    for unmasked, cached in ((U, True), (0.0, "auto")):
        path = _config(toy, "cached", data, **settings, unmasked_weight=unmasked, cache=cached)
        runner = runs.build(path, tmp_path / f"cached{unmasked}")
        stream = runner.train_loop.stream
        online = runs.build(path, tmp_path / f"online{unmasked}", "cache=False").train_loop.stream
        assert stream.cached_sample is not None
        for position in range(40):
            one, other = online[position], stream[position]
            assert other.keys() - {"token_ids"} == one.keys() - {"image"}
            assert np.array_equal(one["target_weights"], other["target_weights"])
            assert one["num_targets"] == other["num_targets"]
    table = tmp_path / "cache" / "pictures.arrow"
    before = table.stat().st_mtime_ns
    runs.build(path, tmp_path / "again")
    assert table.stat().st_mtime_ns == before
    changed = next(data.glob("*.mask.png"))
    content = changed.read_bytes()
    with Image.open(changed) as mask:
        Image.new("L", mask.size, 7).save(changed)
    runs.build(path, tmp_path / "changed")
    changed.write_bytes(content)
    assert table.stat().st_mtime_ns != before


def test_regions_of_images_in_their_own_shapes(toy: Toy, data: Path, tmp_path: Path) -> None:
    """A step of mixed shapes is that of its images one by one, online and from the cache."""
    folder = tmp_path / "shapes"
    shutil.copytree(data, folder)
    for index, name in enumerate(sorted({file.name.split(".")[0] for file in folder.glob("*.*g")})):
        for file in folder.glob(f"{name}.*g"):
            with Image.open(file) as image:
                image.resize([(40, 40), (40, 80), (80, 40)][index % 3]).save(file)
    path = _config(toy, "shapes", folder, aspect="keep", image_variations=2, max_iters=9)
    step = runs.first_step(path, tmp_path / "whole", "cache=False")
    assert_same_step(step, runs.first_step(path, tmp_path / "one", "cache=False", "micro_batch_size=1"))
    assert_same_step(step, runs.first_step(path, tmp_path / "cached", "cache=True"))
    runner = runs.build(path, tmp_path / "cached again", "cache=True")
    regions = {runner.train_loop.stream.fixed_sample(index)["region"].shape for index in range(10)}
    assert len(regions) == 3


def test_masks_in_one_of_several_sources(toy: Toy, data: Path, tmp_path: Path) -> None:
    """The other's images count whole; a token's weight is its source's times its own."""
    sources = [{"path": str(data), "name": "masked"}, {"path": str(toy.data), "name": "plain", "weight": 0.5}]
    settings = {"batch_size": 8, "image_variations": 2, "data": sources, "unmasked_weight": U}
    path = toy.config("sources", max_iters=9, **settings)
    step = runs.first_step(path, tmp_path / "whole", "cache=False")
    assert_same_step(step, runs.first_step(path, tmp_path / "one", "cache=True", "micro_batch_size=1"))
    stream = runs.build(path, tmp_path / "again").train_loop.stream
    samples = [stream[position] for position in range(20)]
    assert step.targets == sum(sample["weight"] * sample["num_targets"] for sample in samples[:8])
    plain = [sample for sample in samples if sample["weight"] == 0.5]
    assert len(plain) == 10
    assert all(sample["num_targets"] == len(sample["masked"]) for sample in plain)


def test_masks_that_are_ignored_change_nothing(toy: Toy, data: Path, tmp_path: Path) -> None:
    """So does data without masks: a sample has no other entries."""
    ignored = runs.build(_config(toy, "ignored", data, unmasked_weight=1.0), tmp_path / "a").train_loop.stream
    plain = runs.build(_config(toy, "plain", toy.data, unmasked_weight=0.1), tmp_path / "b").train_loop.stream
    for position in range(10):
        one, other = ignored[position], plain[position]
        assert one.keys() == other.keys()
        assert one.keys().isdisjoint({"mask", "region", "token_weights", "target_weights"})
        assert torch.equal(one["image"], other["image"])
        assert one["masked"].tolist() == other["masked"].tolist()
        assert (one["num_targets"], type(one["num_targets"])) == (other["num_targets"], int)


def test_a_step_in_the_black_alone_learns_nothing(toy: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "black"
    shutil.copytree(toy.data, folder)
    for file in ImageTextDataset(str(folder)).files():
        with Image.open(file) as image:
            Image.new("L", image.size, 0).save(file.with_suffix(".mask.png"))
    step = runs.first_step(
        _config(toy, "black", folder, unmasked_weight=0.0, batch_size=2, max_iters=2), tmp_path / "a"
    )
    assert (step.targets, step.loss_sum) == (0, 0)
    assert all(grad.count_nonzero() == 0 for grad in step.grads)
    assert [line["loss"] for line in metrics(tmp_path / "a")] == [None, None]
    assert all("bad_steps" not in line for line in metrics(tmp_path / "a"))


def test_thumbnails_of_the_runs_page_are_faded_where_nothing_is_learnt(toy: Toy, data: Path, tmp_path: Path) -> None:
    means = []
    for unmasked in (U, 1.0):
        path = _config(toy, "thumbnails", data, unmasked_weight=unmasked)
        found = data_at_a_glance(runs.build(path, tmp_path / str(unmasked)))["thumbnails"]
        means.append([np.asarray(Image.open(tmp_path / str(unmasked) / item["file"])).mean() for item in found])
    assert [masked > plain for masked, plain in zip(*means)] == [index % 3 > 0 for index in range(10)]


def test_options_that_cannot_work(toy: Toy, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match=r"unmasked_weight got 0.3, but the data has no masks; add NAME.mask.png"):
        runs.build(_config(toy, "none", toy.data, unmasked_weight=0.3), tmp_path / "none")
    assert train(_config(toy, "range", data, unmasked_weight=1.5), tmp_path / "range") == 2
    assert "unmasked_weight got 1.5; expected a number from 0 to 1" in capsys.readouterr().err
    vq = toy.vq_config("vq", 1, 1)
    Path(vq).write_text(Path(vq).read_text().replace(str(toy.data), str(data)))
    with pytest.raises(UserError, match="this model learns whole images; set unmasked_weight=1 to ignore the masks"):
        runs.build(vq, tmp_path / "vq")
    runs.build(vq, tmp_path / "vq", "train_dataloader.unmasked_weight=1").train()
    assert "masks" not in capsys.readouterr().out
    runs.build(_config(toy, "says", data), tmp_path / "says")
    assert "masks: the black counts 0.2, and the white 1 (unmasked_weight)" in capsys.readouterr().out


def test_weights_of_samples_and_of_tokens_multiply() -> None:
    batch = {"weight": [2.0, 0.5], "num_targets": [1.5, 3.0], "bucket": [1, 1]}
    assert count_targets(batch) == 4.5
    assert targets_by(batch, "bucket") == {1: 4.5}
