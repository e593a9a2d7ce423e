"""Text in any script on an image, each character in the first font that has it.

Pillow's own font has ASCII and little more. DejaVu Sans, which matplotlib ships, has most alphabets; Noto Sans CJK of
`pip install 'diffengine[fonts]'` has Chinese, Japanese and Korean; after these, the fonts of the system are searched.
"""

import importlib.util
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import final

from PIL import ImageDraw, ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
NO_CHARACTER = "\U0010ffff"  # no font has a glyph for it: each draws its box
LONGEST = 2000  # characters that are measured; no label shows more


@final
class Text:
    """Measures, breaks and draws text of one size.

    Args:
        size: of the letters in pixels.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.height = sum(self._font(0).getmetrics())  # type: ignore[union-attr]

    def length(self, text: str) -> float:
        """The width of a text in pixels."""
        return sum(self._font(number).getlength(run) for number, run in self._runs(text))

    def draw(self, sheet: ImageDraw.ImageDraw, left: float, top: float, text: str, ink: tuple[int, int, int]) -> None:
        """Draw one line; all fonts stand on the same base line."""
        base = top + self._font(0).getmetrics()[0]  # type: ignore[union-attr]
        for number, run in self._runs(text):
            font = self._font(number)
            sheet.text((left, base), run, ink, font, anchor="ls")
            left += font.getlength(run)

    def wrap(self, text: str, width: int, most: int = 4) -> list[str]:
        """At most `most` lines no wider than `width` pixels, broken at spaces, or within a word that is too long."""
        lines = [""]
        for word in text[:LONGEST].split():
            longer = f"{lines[-1]} {word}".strip()
            if self.length(longer) <= width:
                lines[-1] = longer
                continue
            lines = [*lines, word] if lines[-1] else [word]
            while len(lines) <= most and (count := self._fitting(lines[-1], width)) < len(lines[-1]):
                lines[-1:] = [lines[-1][:count], lines[-1][count:]]
            if len(lines) > most:
                break
        if len(lines) > most:
            last = lines[most - 1]
            lines = [*lines[: most - 1], last[: self._fitting(last, width - self.length("…"))] + "…"]
        return lines

    def _fitting(self, text: str, width: float) -> int:
        """How many characters fit into a width, at least one."""
        low, high = 1, len(text) + 1  # so many fit; so many do not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.length(text[:middle]) <= width else (low, middle)
        return low

    def _runs(self, text: str) -> Iterator[tuple[int, str]]:
        """Neighbouring characters of the same font, with the font's number.

        Marks and spaces stay with what is before them: a script that joins letters or runs from right to left is
        drawn right only as one run.
        """
        number, run = 0, ""
        for char in text:
            stays = char.isspace() or unicodedata.category(char) in ("Mn", "Mc", "Me", "Cf")
            found = number if stays else font_of(char)
            if found != number and run:
                yield number, run
                run = ""
            number, run = found, run + char
        yield number, run

    def _font(self, number: int) -> Font:
        return _load(number, self.size)


@lru_cache(maxsize=4096)
def font_of(char: str) -> int:
    """The number of the first font that has a character; 0, Pillow's own, if none has it."""
    if char.isascii() or _has(0, char):
        return 0
    return next((number for number in range(1, 1 + len(_files())) if _has(number, char)), 0)


def _has(number: int, char: str) -> bool:
    try:
        font = _load(number, 14)
        return bytes(font.getmask(char)) != bytes(font.getmask(NO_CHARACTER))
    except OSError:  # a bitmap font of other sizes
        return False


@lru_cache(maxsize=64)
def _load(number: int, size: int) -> Font:
    return ImageFont.truetype(_files()[number - 1], size) if number else ImageFont.load_default(size)


@lru_cache
def _files() -> list[str]:
    """The fonts after Pillow's own, the ones that we know first; of the system's, sans-serif ones before others."""
    from matplotlib import font_manager, get_data_path

    known = [Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"]
    for package in ("noto_cjk_sans_jp_regular",):
        found = importlib.util.find_spec(package)
        if found is not None and found.origin:
            known += sorted(Path(found.origin).parent.glob("*.otf"))
    system = [path for path in font_manager.findSystemFonts() if "LastResort" not in path]
    return [*map(str, known), *sorted(system, key=lambda path: ("Sans" not in path, "Regular" not in path, path))]
