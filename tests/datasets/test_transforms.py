from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffengine.datasets import Crop, DropCaption, Flip, Resize, ToTensor, VaryTags
from diffengine.errors import UserError


def rng(seed=0):
    return np.random.default_rng(seed)


def coordinates(width, height):
    """An image whose red is x and whose green is y."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def run(transforms, sample, generator):
    for transform in transforms:
        sample = transform(sample, generator)
    return sample


@pytest.mark.parametrize("order", ["flip, crop", "crop, flip"])
def test_micro_conditions_give_the_position_of_the_crop(order):
    """The position of the crop in the flipped image is recomputed from its pixels."""
    generator, flips, indices = rng(), 0, set()
    for _ in range(60):
        steps = [Flip(0.5), Crop(16)] if order == "flip, crop" else [Crop(16), Flip(0.5)]
        sample = run([*steps, ToTensor(5.5)], {"image": coordinates(40, 20), "text": ""}, generator)
        pixels = (sample["image"] * 255).round().to(torch.int64)
        x, y = pixels[0], pixels[1]
        flipped = bool(x[0, 1] < x[0, 0])
        left = 39 - int(x[0, 0]) if flipped else int(x[0, 0])
        assert sample["micro_conds"].tolist() == [40, 20, int(y[0, 0]), left, 5.5]
        flips += flipped
        indices.add((int(y[0, 0]), left))
    assert 15 < flips < 45
    assert len(indices) > 40


def test_original_size_is_the_size_before_resizing():
    sample = run([Resize(16), Crop(16, random=False), ToTensor()], {"image": coordinates(100, 50)}, rng())
    # 100x50 becomes 32x16, and its centre square starts at left 8
    assert sample["micro_conds"].tolist() == [100, 50, 0, 8, 6]
    assert sample["micro_conds"].dtype == torch.float32
    assert set(sample) == {"image", "micro_conds"}


def test_pixels_are_scaled_exactly_to_0_to_1():
    sample = ToTensor()({"image": coordinates(256, 3)}, rng())
    assert (sample["image"].shape, sample["image"].dtype) == ((3, 3, 256), torch.float32)
    assert torch.equal(sample["image"][0, 0], torch.arange(256) / 255)
    assert sample["micro_conds"].tolist() == [256, 3, 0, 0, 6]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 50), (32, 16)),
        ((50, 100), (16, 32)),
        ((16, 16), (16, 16)),
        ((5, 4), (20, 16)),
        ((33, 17), (31, 16)),
    ],
)
def test_resize_sets_the_short_side(size, expected):
    sample = Resize(16)({"image": Image.new("RGB", size)}, rng())
    assert sample["image"].size == expected
    assert sample["original_size"] == size


def test_very_long_images_are_cropped_before_resizing():
    """Up to an aspect ratio of 64 the whole image is resized; beyond it only the middle."""
    line = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 258, 3), dtype=np.uint8))
    whole = line.crop((0, 0, 256, 4))
    for image in (whole, whole.transpose(Image.Transpose.TRANSPOSE)):
        width, height = (side * 2 for side in image.size)
        expected = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)
        assert Resize(8)({"image": image}, rng())["image"].tobytes() == expected.tobytes()
    middle = line.crop((1, 0, 257, 4))
    for rotate in (lambda image: image, lambda image: image.transpose(Image.Transpose.TRANSPOSE)):
        got, expected = (Resize(8)({"image": rotate(image)}, rng()) for image in (line, middle))
        assert got["original_size"] == rotate(line).size
        assert got["image"].tobytes() == expected["image"].tobytes()


def triangle(pixels, length):
    """Antialiased bilinear downscaling along the first axis: the triangle filter is as wide as the scale."""
    scale = len(pixels) / length
    indices = np.arange(len(pixels)) + 0.5
    weights = np.maximum(0, 1 - np.abs((np.arange(length)[:, None] + 0.5) * scale - indices) / scale)
    return np.tensordot(weights / weights.sum(axis=1, keepdims=True), pixels, axes=1)


@pytest.mark.parametrize(("size", "tolerance"), [(128, 1.5), (32, 8)])
def test_resize_is_antialiased(size, tolerance):
    """Compares with the formula on a real photo. For large reductions PIL applies a box filter first."""
    skimage = pytest.importorskip("skimage")
    with Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png") as image:
        photo = image.convert("RGB")
    shown = np.asarray(Resize(size)({"image": photo}, rng())["image"], float)
    expected = triangle(triangle(np.asarray(photo, float), size).swapaxes(0, 1), size).swapaxes(0, 1)
    assert np.abs(shown - expected).max() <= tolerance
    plain = np.asarray(photo, float)[:: 512 // size, :: 512 // size]
    assert np.abs(plain - expected).max() > 60  # the error if pixels were skipped


def test_random_crops_are_uniform():
    generator = rng()
    tops = [Crop(4)({"image": coordinates(6, 5)}, generator)["crop_top_left"] for _ in range(1200)]
    counts = {index: tops.count(index) for index in sorted(set(tops))}
    assert list(counts) == [(top, left) for top in range(2) for left in range(3)]
    assert all(150 < count < 250 for count in counts.values())


@pytest.mark.parametrize(("p", "low", "high"), [(0, 0, 0), (0.1, 160, 240), (0.9, 1760, 1840), (1, 2000, 2000)])
def test_captions_are_dropped_with_probability_p(p, low, high):
    generator, transform = rng(), DropCaption(p)
    samples = [transform({"text": "a fox"}, generator) for _ in range(2000)]
    assert all(sample["text"] == ("" if sample["caption_dropped"] else "a fox") for sample in samples)
    assert low <= sum(sample["caption_dropped"] for sample in samples) <= high


@pytest.mark.parametrize(
    ("options", "text", "expected"),  # of the rest, "b", "c", "d", "e", the numbers below leave out "c" and "e"
    [
        ({}, "a,b ,c, , d,e,", "a, d, b, e, c"),
        ({"drop": 0.5}, "a, b, c, d, e", "a, d, b"),
        ({"drop": 0.5, "shuffle": False}, "a, b, c, d, e", "a, b, d"),
        ({"drop": 1.0}, "a, b, c, d, e", "a"),
        ({"drop": 1.0, "keep": 0}, "b, c, d, e", ""),
        ({"keep": 0}, "b, c, d, e", "d, b, e, c"),
        ({"keep": 2}, "a, a, b, c, d, e", "a, a, d, b, e, c"),
        ({"separator": " | "}, "a, x | b | c | d | e", "a, x | d | b | e | c"),
        ({"separator": " "}, "a b  c d e", "a d b e c"),
        ({"keep": 2}, " a,b ", " a,b "),  # nothing can vary
        ({"keep": 0}, "", ""),
    ],
)
def test_tags_are_shuffled_and_left_out(options, text, expected):
    class Numbers:
        def random(self, shape):
            return np.array([[0.3, 0.9, 0.1, 0.5], [0.5, 0.49, 0.99, 0.0]])[:, : shape[1]]

    sample = {"text": text, "other": 1}
    assert VaryTags(**options)(sample, Numbers()) == {"text": expected, "other": 1}
    assert sample["text"] == text


def test_options_do_not_change_later_random_numbers():
    sample = {"image": coordinates(9, 9), "text": "a, fox"}
    for first, second in [
        (DropCaption(0), DropCaption(1)),
        (Flip(0), Flip(1)),
        (Crop(4), Crop(4, random=False)),
        (VaryTags(True), VaryTags(False, 1.0)),
    ]:
        after = []
        for transform in (first, second):
            generator = rng(7)
            transform(sample, generator)
            after.append(generator.random())
        assert after[0] == after[1]
    assert DropCaption(0)(sample, rng())["text"] == "a, fox"
    assert np.array_equal(Flip(0)(sample, rng())["image"], sample["image"])


def test_transforms_do_not_change_the_sample_in_place():
    sample = {"image": coordinates(9, 9), "text": "a fox"}
    run([Resize(5), Crop(4), Flip(1), DropCaption(1), ToTensor()], sample, rng())
    assert list(sample) == ["image", "text"]
    assert sample["image"].size == (9, 9)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Resize(0), "Resize got size=0; expected at least 1"),
        (lambda: Crop(-1), "Crop got size=-1"),
        (lambda: Flip(1.5), "Flip got p=1.5; expected a probability from 0 to 1"),
        (lambda: DropCaption(float("nan")), "DropCaption got p=nan"),
        (lambda: VaryTags(drop=1.5), "drop_tags got 1.5; expected a probability from 0 to 1"),
        (lambda: VaryTags(keep=-1), "keep_tags got -1; expected 0 or more"),
        (lambda: VaryTags(separator=""), "tag_separator got ''; expected what is between two tags"),
        (
            lambda: Crop(8)({"image": coordinates(9, 7)}, rng()),
            r"image of 9x7; expected at least 8x8; put Resize",
        ),
    ],
)
def test_wrong_options(build, match):
    with pytest.raises(UserError, match=match):
        build()
