"""The number and the positions of masked tokens, against tables and hand-written cases."""

from typing import Any

import numpy as np
import pytest
import torch

from diffengine.errors import UserError
from diffengine.models.masking import RandomMask, TokenGrid, mask_tokens, masked_index, num_masked, sums_by_bucket


@pytest.mark.parametrize(
    ("schedule", "num_tokens", "table"),
    [
        # n = round(L cos(pi t / 2)), computed by hand: cos of 0, 30, 45, 60, 81 and 90 degrees
        ("cosine", 256, {0.0: 256, 1 / 3: 222, 0.5: 181, 2 / 3: 128, 0.9: 40, 1.0: 1}),
        ("cosine", 1024, {0.0: 1024, 1 / 3: 887, 0.5: 724, 2 / 3: 512, 0.9: 160, 1.0: 1}),
        ("linear", 256, {0.0: 256, 0.25: 192, 0.5: 128, 0.9: 26, 0.999: 1, 1.0: 1}),
    ],
)
def test_number_of_masked_tokens(schedule: Any, num_tokens: int, table: dict[float, int]) -> None:
    assert {t: num_masked(t, num_tokens, schedule) for t in table} == table


def masked_sample(seed: int, size: int = 64, schedule: Any = "cosine") -> dict[str, Any]:
    sample = {"image": torch.zeros(3, size, size), "text": "a"}
    return RandomMask(TokenGrid(4, 2), schedule)(sample, np.random.default_rng(seed))


def test_masked_positions_start_one_permutation() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        n, order = num_masked(rng.random(), 256), rng.permutation(256)
        sample = masked_sample(seed)
        assert sample["num_targets"] == n == len(sample["masked"])
        assert sample["num_tokens"] == 256
        assert sample["bucket"] / 8 <= np.random.default_rng(seed).random() < (sample["bucket"] + 1) / 8
        np.testing.assert_array_equal(sample["masked"], order[:n])
        assert len(set(sample["masked"].tolist())) == n
        assert sample["text"] == "a"


def test_mean_share_of_masked_tokens() -> None:
    """For t ~ U(0, 1), cos(pi t / 2) has the mean 2/pi, and 1 - t the mean 1/2. Standard errors are below 0.01."""
    cosine = np.mean([masked_sample(seed)["num_targets"] / 256 for seed in range(2000)])
    linear = np.mean([masked_sample(seed, schedule="linear")["num_targets"] / 256 for seed in range(2000)])
    assert cosine == pytest.approx(2 / np.pi, abs=0.03)
    assert linear == pytest.approx(0.5, abs=0.03)


def test_cached_tokens_get_the_mask_of_their_image() -> None:
    cached = RandomMask(TokenGrid(4))({"token_ids": torch.zeros(16, 16)}, np.random.default_rng(7))
    np.testing.assert_array_equal(cached["masked"], masked_sample(7)["masked"])


@pytest.mark.parametrize(("size", "suggested"), [((60, 60), "64"), ((64, 42), "40"), ((4, 4), "8")])
def test_indivisible_sides_are_an_error(size: tuple[int, int], suggested: str) -> None:
    sample = {"image": torch.zeros(3, *size)}
    with pytest.raises(UserError, match=rf"got images of {size[1]}x{size[0]} px.*by 8 \(4 px.*to {suggested}$"):
        RandomMask(TokenGrid(4, 2))(sample, np.random.default_rng(0))
    with pytest.raises(UserError, match="divisible by 8"):
        TokenGrid(4, 2)(sample, np.random.default_rng(0))


def test_grid_of_a_model_without_downsampling() -> None:
    assert TokenGrid(4).sides(60, 36) == (15, 9)
    assert TokenGrid(4)({"text": "a"}, np.random.default_rng(0)) == {"text": "a"}


def test_sums_by_bucket() -> None:
    """Images 0 and 2 are in bucket 5, image 1 is in bucket 0; each has 12 tokens."""
    index = masked_index([np.array([11, 0]), np.array([5]), np.array([0])], num_tokens=12)
    sums = sums_by_bucket(torch.tensor([1.0, 2.0, 4.0, 8.0]), index, torch.tensor([5, 0, 5]), 12)
    assert sums.tolist() == [4, 0, 0, 0, 0, 11, 0, 0]


def test_only_masked_tokens_are_replaced() -> None:
    token_ids = torch.arange(24).view(2, 3, 4)
    index = masked_index([np.array([11, 0]), np.array([5])], num_tokens=12)
    assert index.tolist() == [11, 0, 17]
    expected = token_ids.clone()
    expected[0, 2, 3] = expected[0, 0, 0] = expected[1, 1, 1] = 99
    input_ids = mask_tokens(token_ids, index, 99)
    assert torch.equal(input_ids, expected)
    assert torch.equal(token_ids, torch.arange(24).view(2, 3, 4))  # the targets are unchanged
    labels = torch.where(input_ids == 99, token_ids, -100)
    assert torch.equal(labels.flatten()[index], token_ids.flatten()[index])
    assert int((labels != -100).sum()) == 3
