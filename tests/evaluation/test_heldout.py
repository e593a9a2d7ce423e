"""The held-out loss: an independent computation, any batch size, any number of ranks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffengine.datasets import collate
from diffengine.evaluation.heldout import TIMES, Losses, fixed_images, losses, unigram_loss
from diffengine.models.amused import AmusedModel
from diffengine.models.frozen import evaluating
from diffengine.models.masking import num_masked
from tests.engine import runs
from tests.engine.runs import Toy

CAPTIONS = ["a cat", "a dog on a sofa", "", "yoda", "a red bird"]


@pytest.fixture(scope="module")
def model(toy: Toy) -> AmusedModel:
    return AmusedModel(str(toy.model)).train()


def make_samples(count: int = 5) -> list:
    rng = torch.Generator().manual_seed(0)
    return [
        ({"image": torch.rand(3, 32, 32, generator=rng), "micro_conds": torch.tensor([32.0, 32, 0, 0, 6]),
          "text": [CAPTIONS[index], "another"]}, 10 + index)
        for index in range(count)
    ]  # fmt: skip


def measure(model: AmusedModel, count: int = 5, captions: bool = True, batch_size: int = 2) -> Losses:
    images = fixed_images(model, make_samples(count), seed=3)
    with evaluating(model):
        return losses(model, images, captions, batch_size)


@torch.no_grad()
def independent(model: AmusedModel, captions: bool) -> tuple[list[float], list[int]]:
    """By the whole transformer, image by image."""
    images, loss, tokens = fixed_images(model, make_samples(), seed=3), [0.0] * 8, [0] * 8
    transformer = model.module("transformer").eval()
    for number, time in enumerate(TIMES):
        for image in images:
            ids = image.sample["token_ids"].long().flatten()
            chosen = torch.from_numpy(image.order_L[: num_masked(time, 64)])
            masked = ids.index_fill(0, chosen, model.mask_id).view(1, 8, 8)
            text = model.preprocessor.text_ids([image.sample["text"] if captions else ""])
            hidden, pooled = model.encode_text(text)
            logits = transformer(masked, hidden, pooled, image.sample["micro_conds"][None])[0].flatten(1).T
            loss[number] += float(F.cross_entropy(logits[chosen], ids[chosen], reduction="sum"))
            tokens[number] += len(chosen)
    return loss, tokens


@pytest.mark.parametrize("captions", [True, False])
def test_losses_equal_an_independent_computation(model: AmusedModel, captions: bool) -> None:
    found = measure(model, captions=captions)
    loss, tokens = independent(model, captions)
    assert found.tokens.tolist() == tokens
    np.testing.assert_allclose(found.loss.numpy(), loss, rtol=1e-5)
    assert found.mean == pytest.approx(sum(loss) / sum(tokens), rel=1e-5)
    assert found.by_time == pytest.approx([a / b for a, b in zip(loss, tokens)], rel=1e-5)
    assert 0 <= found.accuracy <= 1


def test_any_batch_size(model: AmusedModel) -> None:
    expected = measure(model, batch_size=1)
    for size in (2, 3, 5, 64):
        found = measure(model, batch_size=size)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
        assert torch.equal(found.tokens, expected.tokens)


def _measure_on_rank(toy: Toy, expected: list[float]) -> None:
    found = measure(AmusedModel(str(toy.model)))
    np.testing.assert_allclose(found.loss.numpy(), expected, rtol=1e-5)


def test_any_number_of_ranks(toy: Toy, model: AmusedModel) -> None:
    runs.on_ranks(2, _measure_on_rank, toy, measure(model).loss.tolist())


def test_masks_are_nested_and_follow_from_the_content(model: AmusedModel) -> None:
    (first, *_), (again, *_) = (fixed_images(model, make_samples(), seed=3) for _ in range(2))
    assert first.order_L.tolist() == again.order_L.tolist()
    assert sorted(first.order_L) == list(range(64))
    (other,) = fixed_images(model, [(make_samples()[0][0], 99)], seed=3)
    assert first.order_L.tolist() != other.order_L.tolist()
    assert first.sample["text"] == "a cat"
    counts = [num_masked(time, 64) for time in TIMES]
    assert counts == sorted(counts, reverse=True)


def test_unigram_loss(model: AmusedModel) -> None:
    images = fixed_images(model, make_samples(2), seed=3)
    trained = [{"token_ids": torch.tensor([[0, 0], [1, 5]])}]
    counts = np.ones(64)
    for token in (0, 0, 1, 5):
        counts[token] += 1
    tokens = np.concatenate([image.sample["token_ids"].numpy().ravel() for image in images]).astype(int)
    assert unigram_loss(trained, images, 64) == pytest.approx(-np.log(counts / counts.sum())[tokens].mean())


def test_a_masked_image_counts_by_its_white_alone(model: AmusedModel) -> None:
    """Losses of the tokens in the white, computed by masks that are the white's tokens among the same positions."""
    white = torch.zeros(8, 8, dtype=torch.uint8)
    white[2:5, 1:7] = 255
    samples = [({**sample, "region": white}, digest) for sample, digest in make_samples(2)]
    images, plain = (fixed_images(model, given, seed=3) for given in (samples, make_samples(2)))
    with evaluating(model):
        found = losses(model, images, True, 2)
        by_sampler = losses(model.sampler(), images, True, 2)
        assert by_sampler.by_time == pytest.approx(found.by_time, rel=1e-5)
        assert (by_sampler.tokens.tolist(), by_sampler.accuracy) == (found.tokens.tolist(), found.accuracy)
        only = white.flatten().numpy() > 0
        for number, time in enumerate(TIMES):
            loss = tokens = 0.0
            for image in plain:
                masked = image.order_L[: num_masked(time, 64)]
                for token in masked[only[masked]]:
                    weights = np.zeros((8, 8), np.float32)
                    weights.flat[token] = 1
                    one = {"masked": masked, "num_targets": 1, "target_weights": weights.flat[masked]}
                    loss += float(model.masked_loss(collate([{**image.sample, **one}]))[0])
                    tokens += 1
            assert found.tokens[number] == tokens
            assert float(found.loss[number]) == pytest.approx(loss, rel=1e-5)
    trained = [{"token_ids": torch.tensor([[3, 3], [7, 7]]), "region": torch.tensor([[255, 51], [0, 0]])}]
    counts = np.ones(64)
    counts[3] += 1.2
    ids = np.concatenate([image.sample["token_ids"].numpy().ravel()[only] for image in images]).astype(int)
    assert unigram_loss(trained, images, 64) == pytest.approx(-np.log(counts / counts.sum())[ids].mean())


def test_a_mask_that_no_transform_has_turned_into_a_region(model: AmusedModel) -> None:
    """Of data whose transforms are not those of a run; an image without a mask counts whole there, too."""
    pixels = np.zeros((32, 32), np.uint8)
    pixels[8:20, 4:28] = 255
    (masked, one), (whole, other) = make_samples(2)
    images = fixed_images(model, [({**masked, "mask": Image.fromarray(pixels)}, one), (whole, other)], seed=3)
    expected = np.zeros((8, 8), np.float32)
    expected[2:5, 1:7] = 1
    assert np.array_equal(images[0].sample["token_weights"], expected)
    assert np.array_equal(images[1].sample["token_weights"], np.ones((8, 8)))
