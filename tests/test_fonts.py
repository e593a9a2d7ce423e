"""Labels in any script: measured, broken into lines, and drawn in a font that has their characters."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffengine.fonts import Text, font_of

TEXT = Text(14)


def drawn(text: str) -> np.ndarray:
    """What is inked by one line, without the empty rows and columns around it."""
    sheet = Image.new("L", (400, 40), 255)
    TEXT.draw(ImageDraw.Draw(sheet), 4, 4, text, 0)  # type: ignore[arg-type]
    ink = np.argwhere(np.asarray(sheet) < 128)
    return np.asarray(sheet)[ink[:, 0].min() : ink[:, 0].max() + 1, ink[:, 1].min() : ink[:, 1].max() + 1]


@pytest.mark.parametrize("char", list("äЖγعא→✓猫ね고"))
def test_a_character_is_drawn_in_a_font_that_has_it(char: str) -> None:
    assert font_of(char) > 0
    assert drawn(char).tobytes() != drawn("\U0010ffff").tobytes()  # not the box


def test_ascii_stays_in_the_first_font() -> None:
    assert {font_of(char) for char in "A cat, [red] <b> 'quoted'"} == {0}


def test_a_line_of_several_scripts_is_as_long_as_its_characters() -> None:
    assert TEXT.length("a猫b") == TEXT.length("a") + TEXT.length("猫") + TEXT.length("b")
    assert drawn("a猫b").shape[1] > drawn("ab").shape[1] + 10


def test_joined_scripts_are_drawn_as_one_run() -> None:
    ((number, run),) = TEXT._runs("قطة على")
    assert (number > 0, run) == (True, "قطة على")
    assert [run for _, run in TEXT._runs("a cat, кот и cat")] == ["a cat, ", "кот и ", "cat"]


def test_wrapped_lines_fit() -> None:
    texts = ["a " * 300, "word" * 100, "a cat " + "long" * 20 + " end", "", "short", "猫" * 300, "кот " * 90]
    for text in texts:
        lines = TEXT.wrap(text, 120)
        assert len(lines) <= 4
        assert all(TEXT.length(line) <= 120 for line in lines)
        whole = "".join(lines).replace(" ", "").removesuffix("…")
        assert text.replace(" ", "").startswith(whole)
    assert TEXT.wrap("a  cat on\na mat", 500) == ["a cat on a mat"]
    assert TEXT.wrap("", 120) == [""]
    for text in (texts[0], texts[1], texts[5]):
        assert TEXT.wrap(text, 120)[-1].endswith("…")
    assert TEXT.wrap("word" * 100, 60, most=1)[0].endswith("…")


@pytest.mark.parametrize("text", ["x" * 5_000_000, "long " * 1_000_000])
def test_a_huge_caption_is_no_more_work_than_a_long_one(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    length = Text.length
    monkeypatch.setattr(Text, "length", lambda self, text: measured.append(len(text)) or length(self, text))
    assert len(TEXT.wrap(text, 120)) == 4
    assert sum(measured) < 100_000
