"""Grids of captioned images, for people to look at."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from diffengine.files import atomic_write

Captioned = tuple[str, Image.Image]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
INK, PAPER = (20, 20, 20), (255, 255, 255)
MORE = "…"


def grid(images: Sequence[Captioned], columns: int | None = None, smallest: int = 128) -> Image.Image:
    """(caption, RGB image) pairs in rows, each caption wrapped to its image's width.

    Args:
        columns: None for the square root of their number, rounded up.
        smallest: images narrower than this, in pixels, are enlarged by a whole factor.
    """
    columns = columns or min(len(images), math.ceil(math.sqrt(len(images))))
    shown = [(caption, enlarge(image, smallest)) for caption, image in images]
    width, height = (max(image.size[axis] for _, image in shown) for axis in (0, 1))
    font = ImageFont.load_default(size=max(11, min(width // 18, 20)))
    wrapped = [wrap(caption, font, width) for caption, _ in shown]
    line_height = math.ceil(sum(font.getmetrics()) * 1.1)  # type: ignore[union-attr]
    gap, foot = 8, line_height * max(map(len, wrapped)) + line_height // 2
    across, down = width + gap, height + foot + gap
    sheet = Image.new("RGB", (columns * across + gap, math.ceil(len(shown) / columns) * down + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, ((_, image), lines) in enumerate(zip(shown, wrapped)):
        left, top = gap + (index % columns) * across, gap + (index // columns) * down
        sheet.paste(image, (left, top))
        for number, line in enumerate(lines):
            draw.text((left, top + height + 2 + number * line_height), line, INK, font)
    return sheet


def save_grid(images: Sequence[Captioned], path: Path, columns: int | None = None) -> Image.Image:
    """Write a grid as PNG; captions that the font cannot render become numbers, listed in `captions.txt`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbered = [(text if renderable(text) else f"[{number}]", image) for number, (text, image) in enumerate(images, 1)]
    if any(new != old for (new, _), (old, _) in zip(numbered, images)):
        lines = [f"[{number}] {caption}\n" for number, (caption, _) in enumerate(images, 1)]
        (path.parent / "captions.txt").write_text("".join(lines), encoding="utf-8")
    return save_image(grid(numbered, columns), path)


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
    font = ImageFont.load_default(size=16)
    title, width = 26, max(image.width for _, image in images)
    sheet = Image.new("RGB", (width, sum(image.height + title for _, image in images)), PAPER)
    draw, top = ImageDraw.Draw(sheet), 0
    for caption, image in images:
        draw.text((8, top + 4), caption, INK, font)
        sheet.paste(image, (0, top + title))
        top += image.height + title
    return sheet


def enlarge(image: Image.Image, smallest: int) -> Image.Image:
    """A small image, enlarged by a whole factor without smoothing, so that its own pixels are visible."""
    factor = max(1, math.ceil(smallest / image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def renderable(caption: str) -> bool:
    """Whether the font has a glyph for every character: those it lacks all become the same box."""
    font = ImageFont.load_default(size=14)
    box = bytes(font.getmask("\U0010ffff"))
    return all(char.isspace() or char.isascii() or bytes(font.getmask(char)) != box for char in set(caption))


def wrap(caption: str, font: Font, width: int, most: int = 4) -> list[str]:
    """At most `most` lines no wider than `width` pixels, broken at spaces, or within a word that is too long."""

    def fitting(text: str, room: int) -> int:  # how many characters fit; at least one
        count = len(text)
        while count > 1 and font.getlength(text[:count]) > room:
            count -= 1
        return count

    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines = [*lines, word] if lines[-1] else [word]
        while (count := fitting(lines[-1], width)) < len(lines[-1]):
            lines[-1:] = [lines[-1][:count], lines[-1][count:]]
    if len(lines) > most:
        last = lines[most - 1]
        lines = [*lines[: most - 1], last[: fitting(last, width - int(font.getlength(MORE)))] + MORE]
    return lines
