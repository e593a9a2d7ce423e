"""Images of any size: the shapes in which they are trained, and the order that keeps each shape together."""

import itertools
import math

import numpy as np
import pytest
from PIL import Image

from diffengine.datasets import ByShape, Crop, Flip, ImageDataset, PositionSampler, Resize, Shapes, Stream, ToTensor
from diffengine.errors import UserError


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32])
def test_images_lose_at_most_one_multiple_of_one_side(n: int) -> None:
    """Checked over ratios from 1:2 to 2:1, with sides counted in multiples."""
    shapes = Shapes(n, 1, 2.0)
    assert shapes.all[0] == (n, n)
    assert all(n * n - 2 * n <= a * b <= n * n and max(a, b) <= 2 * min(a, b) for a, b in shapes.all)
    for width in np.exp(np.linspace(-math.log(2), math.log(2), 401)) * 10_000:
        a, b = shapes.of((int(width), 10_000))
        scale = max(a / width, b / 10_000)
        assert max(width * scale - a, 10_000 * scale - b) <= 1 + 1e-3


def test_shapes_of_the_released_models() -> None:
    at_512, at_256 = Shapes(512, 32, 2.0), Shapes(256, 16, 2.0)
    assert len(at_512.all) == len(at_256.all) == 26
    assert at_512.of((1500, 1000)) == (608, 416)
    assert at_512.of((1000, 1500)) == (416, 608)
    assert at_512.of((999, 1000)) == (512, 512)
    assert at_512.of((5000, 100)) == (704, 352)  # longer than 2:1, so it loses more
    assert Shapes(512).all == [(512, 512)]
    assert Shapes(512, 32, 1.0).of((5000, 100)) == (512, 512)


def test_what_is_cut_off_and_enlarged() -> None:
    sizes = [(1024, 1024), (1024, 512), (300, 300)]
    assert Shapes(512).lost(sizes) == pytest.approx((0 + 0.5 + 0) / 3)
    kept = Shapes(512, 32, 2.0)
    assert kept.lost(sizes) == 0
    assert kept.enlarged(sizes) == pytest.approx(1 / 3)
    assert kept.lost([(1500, 1000)]) == pytest.approx(1 - (608 / 416) / 1.5)


def test_an_indivisible_side_is_refused() -> None:
    with pytest.raises(UserError, match=r"resolution got 500; this model needs sides divisible by 32: set .* to 512"):
        Shapes(500, 32, 2.0)


def test_each_image_goes_to_its_shape_with_true_conditions() -> None:
    square = [Resize(64), Flip(0.5), Crop(64), ToTensor()]
    transform = ByShape(square, Shapes(64, 8, 2.0))
    rng = np.random.default_rng(0)
    sample = transform({"image": Image.new("RGB", (310, 200)), "text": ""}, rng)
    assert sample["image"].shape == (3, 48, 72)
    assert sample["micro_conds"].tolist()[:2] == [310, 200]
    assert transform.effect((310, 200)) == ((72, 48), True)
    assert ByShape([Resize(64), Crop(64)], Shapes(64, 8, 2.0)).effect((150, 100)) == ((72, 48), False)
    with pytest.raises(UserError, match=r"Resize to \(72, 72\), and images of \(64, 64\); expected .* of one size"):
        ByShape([Resize(72), Crop(64)], Shapes(64, 8, 2.0))


class Sizes(ImageDataset):
    """Images that are as large as they are asked to be."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> dict:
        return {"image": Image.new("RGB", self.sizes[index]), "text": str(index)}

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index]


def stream_of(sizes: list[tuple[int, int]], batch_size: int | None, seed: int = 0) -> Stream:
    transforms = [ByShape([Resize(64), Crop(64), ToTensor()], Shapes(64, 8, 2.0))]
    return Stream(Sizes(sizes), transforms, [], seed=seed, batch_size=batch_size)


def test_steps_are_of_one_shape_and_each_image_is_taken_once() -> None:
    """Over 3 epochs of 1,000 images of 12 shapes, in batches of 8; an epoch begins in the middle of a step."""
    shapes = Shapes(64, 8, 2.0).all[:12]
    stream = stream_of([shapes[index] for index in np.random.default_rng(0).integers(12, size=1001)], 8)
    located = [stream.locate(position) for position in range(3 * 1001)]
    for epoch in range(3):
        taken = located[epoch * 1001 : (epoch + 1) * 1001]
        assert {at for at, _ in taken} == {epoch}
        assert sorted(index for _, index in taken) == list(range(1001))
    assert stream.shapes is not None
    steps = [located[start : start + 8] for start in range(0, 3 * 1001 - 7, 8)]
    pure = [len({stream.shapes[index] for _, index in step}) == 1 for step in steps]
    assert np.mean(pure) > 0.9
    orders = [[index for _, index in located[start : start + 1001]] for start in (0, 1001)]
    assert orders[0] != orders[1]
    # The pure steps are spread over the epoch, not sorted by shape.
    firsts = [stream.shapes[step[0][1]] for step in steps[:60]]
    assert sum(a != b for a, b in itertools.pairwise(firsts)) > 30


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_stream_does_not_depend_on_ranks(world_size: int) -> None:
    stream = stream_of([(64, 64), (80, 48), (48, 80)] * 7, 6)
    alone = [stream.locate(position) for step in PositionSampler(6, num_steps=8) for position in step]
    ranks = [list(PositionSampler(6, rank=rank, world_size=world_size, num_steps=8)) for rank in range(world_size)]
    shared = [stream.locate(position) for step in zip(*ranks) for share in step for position in share]
    assert shared == alone


@pytest.mark.parametrize(("images", "batch_size"), [(5, 8), (8, 8), (23, 4), (1, 3), (7, 1)])
def test_small_data_and_odd_batches(images: int, batch_size: int) -> None:
    stream = stream_of([[(64, 64), (80, 48)][index % 2] for index in range(images)], batch_size)
    for epoch in range(5):
        taken = [stream.locate(epoch * images + rank) for rank in range(images)]
        assert sorted(index for _, index in taken) == list(range(images))


def test_the_order_of_one_shape_is_that_without_shapes() -> None:
    sizes = [(64, 64)] * 20
    one, plain = stream_of(sizes, 8, seed=3), stream_of(sizes, None, seed=3)
    assert [one.locate(position) for position in range(60)] == [plain.locate(position) for position in range(60)]
