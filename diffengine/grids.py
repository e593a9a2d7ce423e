"""Grids of captioned images, for people to look at."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from diffengine.files import atomic_write
from diffengine.fonts import Text

Captioned = tuple[str, Image.Image]
INK, PAPER = (20, 20, 20), (255, 255, 255)


def grid(images: Sequence[Captioned], columns: int | None = None, smallest: int = 128) -> Image.Image:
    """(caption, RGB image) pairs in rows, each caption wrapped to its image's width.

    Args:
        columns: None for the square root of their number, rounded up.
        smallest: images narrower than this, in pixels, are enlarged by a whole factor.
    """
    columns = columns or min(len(images), math.ceil(math.sqrt(len(images))))
    shown = [(caption, enlarge(image, smallest)) for caption, image in images]
    width, height = (max(image.size[axis] for _, image in shown) for axis in (0, 1))
    text = Text(max(11, min(width // 18, 20)))
    wrapped = [text.wrap(caption, width) for caption, _ in shown]
    line_height = math.ceil(text.height * 1.1)
    gap, foot = 8, line_height * max(map(len, wrapped)) + line_height // 2
    across, down = width + gap, height + foot + gap
    sheet = Image.new("RGB", (columns * across + gap, math.ceil(len(shown) / columns) * down + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, ((_, image), lines) in enumerate(zip(shown, wrapped)):
        left, top = gap + (index % columns) * across, gap + (index // columns) * down
        sheet.paste(image, (left, top))
        for number, line in enumerate(lines):
            text.draw(draw, left, top + height + 2 + number * line_height, line, INK)
    return sheet


def save_grid(images: Sequence[Captioned], path: Path, columns: int | None = None) -> Image.Image:
    """Write a grid as PNG, with the whole captions as its text, one per line."""
    captions = "\n".join(" ".join(caption.split()) for caption, _ in images)
    return save_image(grid(images, columns), path, {"captions": captions})


def save_image(image: Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> Image.Image:
    """Write an image as PNG, with `texts` as its text chunks, and return it."""
    info = PngInfo()
    for name, text in (texts or {}).items():
        info.add_itxt(name, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
    return image


def save_webp(image: Image.Image, path: Path) -> None:
    """Write an image as WebP: lossless if it is small, else at quality 90."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        image.save(temporary, format="WEBP", lossless=max(image.size) <= 128, quality=90)


def stack(images: Sequence[Captioned]) -> Image.Image:
    """Images one above the other, each under its title."""
    text = Text(16)
    title, width = 26, max(image.width for _, image in images)
    sheet = Image.new("RGB", (width, sum(image.height + title for _, image in images)), PAPER)
    draw, top = ImageDraw.Draw(sheet), 0
    for caption, image in images:
        text.draw(draw, 8, top + 4, text.wrap(caption, width - 16, 1)[0], INK)
        sheet.paste(image, (0, top + title))
        top += image.height + title
    return sheet


def enlarge(image: Image.Image, smallest: int) -> Image.Image:
    """A small image, enlarged by a whole factor without smoothing, so that its own pixels are visible."""
    factor = max(1, math.ceil(smallest / image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
