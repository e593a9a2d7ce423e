"""Grids of captioned images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffengine.grids import enlarge, grid, save_grid, stack


def plain(size: int, colour: tuple[int, int, int] = (200, 0, 0)) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


@pytest.mark.parametrize(("size", "count", "columns", "shown"), [
    (512, 1, 1, 512), (512, 3, 2, 512), (32, 1, 1, 128), (32, 16, 4, 128), (100, 5, 3, 200),
])  # fmt: skip
def test_layout(size: int, count: int, columns: int, shown: int) -> None:
    sheet = np.asarray(grid([("a cat", plain(size))] * count))
    rows = -(-count // columns)
    assert sheet.shape[1] == columns * (shown + 8) + 8
    red = (sheet == (200, 0, 0)).all(axis=-1)
    assert red.sum() == count * shown * shown  # no caption covers an image
    assert red[8 : 8 + shown, 8 : 8 + shown].all()
    height = (sheet.shape[0] - 8) // rows
    assert (sheet[8 + shown : 8 + height] < 100).any()  # caption text under the first row


def test_columns() -> None:
    assert grid([("", plain(128))] * 6, columns=6).width == 6 * 136 + 8


def test_small_images_are_enlarged_by_whole_factors() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8))
    big = enlarge(image, 128)
    assert big.size == (144, 144)
    np.testing.assert_array_equal(np.asarray(big)[1::3, 1::3], np.asarray(image))


def test_captions_are_kept_whole_in_the_png(tmp_path: Path) -> None:
    path = tmp_path / "new" / "grid.png"
    shown = save_grid([("a cat", plain(32)), ("ねこ\n🐱", plain(32))], path)
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]
    with Image.open(path) as saved:
        assert saved.tobytes() == shown.tobytes()
        assert saved.text == {"captions": "a cat\nねこ 🐱"}


def test_stack() -> None:
    sheet = np.asarray(stack([("before", plain(64)), ("after", plain(96, (0, 0, 200)))]))
    assert sheet.shape == (64 + 96 + 2 * 26, 96, 3)
    assert ((sheet == (200, 0, 0)).all(axis=-1)).sum() == 64 * 64
    assert ((sheet == (0, 0, 200)).all(axis=-1)).sum() == 96 * 96
