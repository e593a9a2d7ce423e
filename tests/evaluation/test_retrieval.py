"""Retrieval by pixels."""

import math

import numpy as np
import pytest
from PIL import Image

from diffengine.evaluation import Gallery
from diffengine.evaluation.retrieval import rate
from tests.support.photos import captioned_photos


def noisy(image: Image.Image, seed: int, amount: int) -> Image.Image:
    pixels = np.asarray(image).astype(int) + np.random.default_rng(seed).integers(-amount, amount + 1, (*image.size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def photos() -> list[tuple[str, Image.Image, str]]:
    return captioned_photos(12, 24)


def test_ranks_equal_a_loop(photos: list) -> None:
    captions, images = [caption for _, _, caption in photos], [image for _, image, _ in photos]
    generated = [noisy(images[(index + index // 6) % 12], index, 90) for index in range(12)]
    found = Gallery(captions, images).ranks(generated, captions)
    expected = []
    for index, image in enumerate(generated):
        pixels = np.asarray(image, dtype=float)
        distances = [math.dist(pixels.ravel(), np.asarray(other, dtype=float).ravel()) for other in images]
        expected.append(sum(distance < distances[index] for distance in distances))
    assert found.tolist() == expected
    assert 0 in expected
    assert max(expected) > 0


def test_images_with_the_same_caption_are_all_right(photos: list) -> None:
    images = [image for _, image, _ in photos[:4]]
    gallery = Gallery(["cat", "cat", "dog", "bird"], images)
    assert gallery.ranks(images, ["cat", "cat", "dog", "cat"]).tolist() == [0, 0, 0, 1]


def test_large_images_are_reduced_to_64_px(photos: list) -> None:
    large = [image.resize((130, 130)) for _, image, _ in photos[:3]]
    gallery = Gallery(["a", "b", "c"], large)
    assert gallery._pixels.shape == (3, 3 * 64 * 64)
    assert gallery.ranks(large, ["a", "b", "c"]).tolist() == [0, 0, 0]


def test_rate_and_its_standard_error() -> None:
    found = np.array([0, 0, 4, 5, 9, 0, 1, 0])
    assert rate(found, 1) == (0.5, pytest.approx(math.sqrt(0.25 / 8)))
    assert rate(found, 5)[0] == 0.75
