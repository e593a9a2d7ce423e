"""Which captions a preview uses, and which options are refused."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffengine.datasets import UnreadableImage
from diffengine.engine.hooks import CheckpointHook, MetricsHook, PreviewHook
from diffengine.engine.hooks.preview import distinct
from diffengine.errors import UserError
from tests.engine.runs import Toy, train


class CaptionedImages:
    """A data set with these captions; None is an image that cannot be read."""

    def __init__(self, captions: list[Any]) -> None:
        self.captions = captions

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.captions[index] is None:
            raise UnreadableImage(f"image {index} is damaged")
        return {"image": Image.new("RGB", (4, 4)), "text": self.captions[index]}


@pytest.mark.parametrize(
    ("captions", "count", "chosen"),
    [
        (list("abcdefgh"), 4, ["a", "e", "b", "g"]),  # spread by the golden ratio
        (list("ab"), 4, ["a", "b"]),
        (list("aaab"), 2, ["a", "b"]),  # distinct, although the evenly spaced ones are equal
        ([["x", "y"], "z"], 2, ["x", "z"]),  # the first of several captions
        ([None, "b", "c", "d"], 2, ["c", "b"]),
    ],
)
def test_distinct_captions(captions: list[Any], count: int, chosen: list[str]) -> None:
    assert list(distinct(CaptionedImages(captions), count, skip_unreadable=True)) == chosen


def test_a_damaged_image_is_an_error_unless_skipped() -> None:
    with pytest.raises(UnreadableImage, match="image 0 is damaged"):
        distinct(CaptionedImages([None, "b"]), 1)


@pytest.mark.parametrize(
    ("hook", "options", "text"),
    [
        (PreviewHook, {"prompts": 0}, "prompts got 0"),
        (PreviewHook, {"every": 0}, "`every` got 0"),
        (CheckpointHook, {"every": -1}, "`every` got -1"),
        (CheckpointHook, {"keep": 0}, "`keep` got 0"),
        (MetricsHook, {"every": 0}, "`every` got 0"),
    ],
)
def test_invalid_options_are_refused(hook: Any, options: dict, text: str) -> None:
    with pytest.raises(UserError, match=text):
        hook(**options)


def test_no_prompts_generate_nothing(toy: Toy, tmp_path: Path) -> None:
    assert train(toy.config("no_previews", prompts=[], preview_every=1), tmp_path) == 0
    assert not (tmp_path / "previews").exists()
    assert not (tmp_path / "before_after.png").exists()
