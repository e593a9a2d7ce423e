"""Several sources as one data set: what each sample is, what an epoch takes, and what is wrong with a source."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffengine.datasets import (
    Crop,
    Flip,
    ImageTextDataset,
    Resize,
    Sources,
    Split,
    Stream,
    SubjectDataset,
    ToTensor,
    VaryTags,
    collate,
    open_dataset,
    samples_of,
)
from diffengine.errors import UserError
from tests.support.photos import all_captions


def write(folder, names, size=(8, 6), first=0):
    """Writes a plain image for each name, with a caption. Its red value is ten times its index from `first` on."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names, start=first):
        Image.new("RGB", size, (10 * index, 0, 0)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"{index}, a, b, c")
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    """Three images (0 to 2), then five of another size (3 to 7)."""
    one = write(tmp_path / "one", ["a.png", "b.png", "c.png"])
    return one, write(tmp_path / "two", [f"{index}.png" for index in range(5)], (4, 4), first=3)


def indices(samples):
    return [sample["image"].getpixel((0, 0))[0] // 10 for sample in samples]


def plain(sample):
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in sample.items()}


TRANSFORMS = [Resize(8), Flip(0.5), Crop(8), ToTensor()]


def test_each_image_has_one_index(folders):
    dataset = Sources([folders[0], {"path": folders[1], "repeats": 3, "prefix": "two: "}])
    one, two = ImageTextDataset(folders[0]), ImageTextDataset(folders[1], prefix="two: ")
    assert len(dataset) == 8
    assert indices(dataset[index] for index in range(8)) == list(range(8))
    assert indices(dataset.__getitems__([7, 0, 3, 7, 2])) == [7, 0, 3, 7, 2]
    assert all_captions(dataset) == all_captions(one) + all_captions(two)
    assert [dataset.captions(index) for index in (2, 3)] == [["2, a, b, c"], ["two: 3, a, b, c"]]
    assert [dataset.size(index) for index in (2, 3)] == [(8, 6), (4, 4)]
    assert [dataset.name(2), dataset.name(3)] == [one.name(2), two.name(0)]
    assert [dataset.content(2), dataset.content(3)] == [one.content(2), two.content(0)]
    assert dataset.files() == one.files() + two.files()


def test_options_are_shared_and_an_item_sets_its_own(folders):
    section = {
        "type": "diffengine.datasets.ImageTextDataset", "prefix": "all: ",
        "path": [folders[0], {"path": folders[1], "prefix": "", "max_samples": 2, "name": "second"}],
    }  # fmt: skip
    dataset = open_dataset(section)
    assert all_captions(dataset) == [f"all: {index}, a, b, c" for index in range(3)] + ["3, a, b, c", "4, a, b, c"]
    assert [(source.name, source.images) for source in dataset.sources] == [("one", 3), ("second", 2)]
    alone = open_dataset({**section, "path": folders[0]})
    assert type(alone) is ImageTextDataset


def test_names_are_distinct(folders, tmp_path):
    other = write(tmp_path / "more" / "one", ["a.png"])
    named = Sources([*folders, other, {"path": folders[0], "name": "one"}, {"path": f"{other}/"}])
    assert [source.name for source in named.sources] == ["one", "two", "one-2", "one-3", "one-4"]


@pytest.mark.parametrize(
    ("repeats", "taken"),
    [((1, 1), [1] * 8), ((4, 1), [4] * 3 + [1] * 5), ((1, 2), [1] * 3 + [2] * 5), (("balance", 1), [2, 2, 1] + [1] * 5),
     (("balance", 2), [4, 3, 3] + [2] * 5), ((7, "balance"), [7] * 3 + [5] + [4] * 4)],
)  # fmt: skip
def test_an_epoch_takes_each_image_as_often_as_it_is_repeated(folders, repeats, taken):
    stream = Stream(
        Sources([{"path": path, "repeats": count} for path, count in zip(folders, repeats)]), [], [], seed=3
    )
    assert len(stream) == sum(taken)
    for epoch in range(3):
        located = [stream.locate(epoch * len(stream) + rank) for rank in range(len(stream))]
        assert Counter(index for _, index in located) == dict(enumerate(taken))
        expected = {(epoch * count + visit, index) for index, count in enumerate(taken) for visit in range(count)}
        assert set(located) == expected  # no visit twice, and none left out
    held_out = Split([0, 2, 3, 4, 6], [1, 5, 7], [], {})
    trained = Stream(stream.dataset, [], [], split=held_out)
    assert Counter(map(int, trained.trained)) == {index: taken[index] for index in held_out.train}


def test_an_image_that_is_repeated_takes_other_variations(tmp_path):
    """Those of an epoch differ, and they are the rows of a cache in turn."""
    rng = np.random.default_rng(0)
    for name, count in (("one", 2), ("two", 3)):
        write(tmp_path / name, [f"{index}.png" for index in range(count)])
        for file in (tmp_path / name).glob("*.png"):
            Image.fromarray(rng.integers(0, 256, (6, 90, 3), dtype=np.uint8)).save(file)
    dataset = Sources([{"path": str(tmp_path / "one"), "repeats": 3}, str(tmp_path / "two")])
    options = {"image_variations": 3, "caption_variations": 3, "vary_caption": VaryTags(drop=0.3)}
    stream = Stream(dataset, TRANSFORMS, [], seed=1, **options)
    seen: dict = {}
    for position in range(3 * len(stream)):
        visit, index = stream.locate(position)
        sample = stream[position]
        (cached,) = stream.read_variations([3 * index + visit % 3])
        assert torch.equal(sample["image"], cached["image"])
        assert sample["text"] == stream.variations_of(cached["text"])[visit % 3]
        if position < len(stream):
            seen.setdefault(index, set()).add(sample["image"].numpy().tobytes())
    assert [len(seen[index]) for index in range(5)] == [3, 3, 1, 1, 1]


def test_a_list_of_one_is_the_path(folders):
    path, listed = (Stream(dataset, TRANSFORMS, [VaryTags()], seed=2, image_variations=2)
                    for dataset in (ImageTextDataset(folders[0]), Sources([folders[0]])))  # fmt: skip
    assert [plain(path[position]) for position in range(12)] == [plain(listed[position]) for position in range(12)]


def test_weights_and_sources_are_in_the_samples(folders):
    stream = Stream(Sources([folders[0], {"path": folders[1], "weight": 0.25}]), [], [])
    for position in range(16):
        sample = stream[position]
        second = stream.locate(position)[1] >= 3
        assert (sample["weight"], sample["source"].tolist()) == ((0.25, [0, 1]) if second else (1.0, [1, 0]))
    assert "weight" not in Stream(Sources(list(folders)), [], [])[0]
    assert "source" not in Stream(Sources([folders[0]]), [], [])[0]
    assert "source" not in stream.read_variations([0])[0]  # so a cache stays valid when weights change
    assert stream.fixed_sample(5)["source"].tolist() == [0, 1]


def test_mirror_is_that_of_the_source(tmp_path):
    """Images whose left half is white: mirrored never, always, or as Flip says."""
    for name in ("never", "always", "asflip"):
        write(tmp_path / name, ["a.png"], (8, 8))
        image = Image.new("RGB", (8, 8))
        image.paste((255, 255, 255), (0, 0, 4, 8))
        image.save(tmp_path / name / "a.png")
    items = [{"path": str(tmp_path / "never"), "mirror": 0}, {"path": str(tmp_path / "always"), "mirror": 1.0}]
    dataset = Sources([*items, str(tmp_path / "asflip")])

    def mirrored(p):
        stream = Stream(dataset, [Resize(8), Flip(p), Crop(8), ToTensor()], [], seed=1)
        found: dict = {0: set(), 1: set(), 2: set()}
        for position in range(30):
            found[stream.locate(position)[1]].add(bool(stream[position]["image"][0, 0, 0] < 0.5))
        return found

    assert mirrored(0.0) == {0: {False}, 1: {True}, 2: {False}}
    assert mirrored(0.5) == {0: {False}, 1: {True}, 2: {False, True}}
    with pytest.raises(UserError, match=r"got mirror=0, but no image transform mirrors; put Flip among them"):
        Stream(dataset, [ToTensor()], [])


@pytest.mark.parametrize(
    ("flip", "mirror", "variations"), [(0, 0.5, 4), (0, 0, 1), (0.5, 0, 4), (0, None, 1), (0, 1, 1)]
)
def test_mirroring_of_one_source_makes_variations(folders, flip, mirror, variations):
    """Of square images: with flip=0.5 those of the first source vary, with mirror=0.5 those of the second."""
    dataset = Sources([folders[1], {"path": folders[1], "mirror": mirror}])
    stream = Stream(dataset, [Resize(8), Flip(flip), Crop(8), ToTensor()], [], image_variations=4)
    assert stream.variations == variations


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"repeat": 2}, r"data\[1\] has no option 'repeat'; did you mean 'repeats'"),
        ({"repeats": 0}, r"data\[1\] got repeats=0; expected 1 to 1,000,000, or 'balance'"),
        ({"repeats": 1.5}, r"data\[1\].repeats got 1.5 \(float\); expected int or 'balance'"),
        ({"weight": 0}, r"data\[1\] got weight=0; expected a finite number above 0"),
        ({"mirror": 2}, r"data\[1\] got mirror=2; expected a probability"),
        ({"prefix": 3}, r"data\[1\].prefix got 3 \(int\); expected str"),
        ({"generate": 3}, r"data\[1\] got generate=3 without a caption; set caption, which is the prompt"),
        ({"path": None}, r"data\[1\] got .*; expected a path, or dict\(path="),
        ({"name": " "}, r"data\[1\] got name=' '; expected a text"),
    ],
)
def test_wrong_options_name_the_item(folders, item, text):
    with pytest.raises(UserError, match=text):
        Sources([folders[0], {"path": folders[1], **item}])


def test_every_dead_source_is_named(folders, tmp_path):
    empty, bare = tmp_path / "empty", Path(write(tmp_path / "bare", ["a.png"]))
    empty.mkdir()
    (bare / "a.txt").unlink()
    missing = str(tmp_path / "missing")
    dead = Sources([folders[0], str(empty), str(bare), missing])
    with pytest.raises(UserError) as caught:
        len(dead)
    summary, *problems = caught.value.lines
    assert summary == "data has 3 problems:"
    first, third, second = sorted(problems, key=lambda line: "caption" in line)
    assert first.startswith(f"  data[1] ('{empty}'): no images in {empty}")
    assert second.startswith(f"  data[2] ('{bare}'): ")
    assert third.startswith(f"  data[3] ('{missing}'): no file or folder '{missing}'")
    long = Sources([{"path": folders[0], "repeats": 10**6}] * 50)
    with pytest.raises(UserError, match=r"an epoch of 150,000,000 samples; expected at most 100,000,000"):
        Stream(long, [], [])
    with pytest.raises(UserError, match=r"data got \[\]; expected a path, or a list"):
        Sources([])
    with pytest.raises(UserError, match=r"path got .*; Sources takes a list"):
        ImageTextDataset([folders[0]])


@pytest.fixture
def dogs(tmp_path):
    """Three images of the subject, one with a caption that must not be used, and five of its class."""
    data = write(tmp_path / "mine", ["a.png", "b.png", "c.png"])
    return data, write(tmp_path / "class", [f"{index}.png" for index in range(5)], (4, 4))


def subject(dogs, **options):
    return SubjectDataset(
        dogs[0], "a photo of sks dog",
        **{"class_data": dogs[1], "class_prompt": "a photo of a dog", "num_class_images": 4, **options},
    )  # fmt: skip


def test_prior_preservation_is_two_balanced_sources(dogs):
    dataset = subject(dogs, prior_loss_weight=0.5)
    assert len(dataset) == 7
    assert indices(dataset[index] for index in range(7)) == [
        0,
        1,
        2,
        0,
        1,
        2,
        3,
    ]  # of the class, the first four of five
    assert [(one.name, one.images, one.weight) for one in dataset.sources] == [("subject", 3, 1.0), ("class", 4, 0.5)]
    assert samples_of(dataset.sources) == [4, 4]
    assert samples_of(subject(dogs, num_class_images=2).sources) == [3, 3]
    assert all_captions(dataset) == ["a photo of sks dog"] * 3 + ["a photo of a dog"] * 4
    assert [dataset.content(index) for index in range(7)] == [None] * 7  # all are trained
    stream = Stream(dataset, [], [], seed=3)
    batch = collate([{**stream[position], "image": None} for position in range(8)])
    assert (
        sorted(zip(batch["text"], batch["weight"])) == [("a photo of a dog", 0.5)] * 4 + [("a photo of sks dog", 1)] * 4
    )


def test_the_samples_are_those_of_version_0_1(dogs):
    """Even entries of an epoch were the subject's and odd ones the class's, each repeated in turn; then permuted."""
    stream = Stream(subject(dogs), [], [], seed=3)
    assert [int(index) for index in stream.trained] == [0, 3, 1, 4, 2, 5, 0, 6]


def test_without_class_images(dogs):
    dataset = SubjectDataset(dogs[0], "sks")
    assert len(Stream(dataset, [], [])) == len(dataset) == 3
    assert indices(dataset[index] for index in range(3)) == [0, 1, 2]
    assert all_captions(dataset) == ["sks"] * 3
    assert dataset.missing_images() == []


def test_missing_images_have_the_first_free_numbers(dogs, tmp_path):
    def missing_of(dogs, **options):
        (missing,) = subject(dogs, **options).missing_images()
        return missing

    assert missing_of(dogs, num_class_images=5).numbers == []
    folder = Path(dogs[1])
    Image.new("RGB", (4, 4)).save(folder / "000001.png")
    (folder / ".000000.png.tmp").write_bytes(b"half of one")
    options = {"guidance_scale": 4.0}
    missing = missing_of(dogs, num_class_images=9, class_drawing=options)
    assert (missing.folder, missing.prompt, missing.options) == (folder, "a photo of a dog", options)
    assert missing.numbers == [0, 2, 3]  # five images and 000001.png exist
    absent = (dogs[0], str(tmp_path / "new" / "class"))
    assert missing_of(absent, num_class_images=2).numbers == [0, 1]
    assert len(Stream(subject(absent, num_class_images=2), [], [])) == 6
    prefixed = Sources([{"path": dogs[1], "generate": 7, "caption": "dog"}], {"prefix": "a "})
    assert prefixed.missing_images()[0].prompt == "a dog"


def test_class_images_are_searched_when_read(dogs, tmp_path):
    folder = tmp_path / "later"
    dataset = subject((dogs[0], str(folder)), num_class_images=2)
    assert dataset[0]["text"] == "a photo of sks dog"
    with pytest.raises(UserError, match=r"later lacks 2 of 2 class images; use a model that generates them"):
        dataset[3]
    write(folder, ["000000.png", "000001.png"])
    assert dataset[3]["text"] == "a photo of a dog"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"class_prompt": None}, "class_prompt=None; expected both, or neither"),
        ({"class_data": None}, "class_data=None and class_prompt='a photo of a dog'; expected both"),
        ({"prior_loss_weight": 0}, "prior_loss_weight got 0; expected a number above 0"),
        ({"num_class_images": 0}, "num_class_images got 0; expected at least 1"),
    ],
)
def test_wrong_options_of_a_subject(dogs, options, text):
    with pytest.raises(UserError, match=text):
        subject(dogs, **options)


def test_wrong_folders(dogs, tmp_path):
    for folders in [(dogs[0], str(Path(dogs[0], "class"))), (dogs[0], str(tmp_path)), (dogs[0], dogs[0])]:
        with pytest.raises(UserError, match="one inside the other; expected separate folders"):
            subject(folders)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file' is not a folder"):
        subject((dogs[0], str(tmp_path / "file"))).missing_images()


def test_generated_images_are_reused_only_with_the_same_settings(dogs):
    folder = Path(dogs[1])
    record = folder / "drawn.json"

    def missing_of(**options):
        (missing,) = subject(dogs, **options).missing_images()
        return missing

    missing_of(num_class_images=5).claim("base")  # the user's own images, none missing
    assert not record.exists()
    missing = missing_of(num_class_images=7)
    missing.claim("base")
    settings = {"prompt": "a photo of a dog", "base": "base", "options": {}}
    assert json.loads(record.read_text()) == {**settings, "pictures": ["000000.png", "000001.png"]}
    other = missing_of(class_prompt="a cat")
    other.claim("base")  # none is generated yet
    write(folder, ["000000.png", "000001.png"])
    missing = missing_of(num_class_images=8)
    missing.claim("base")
    assert json.loads(record.read_text())["pictures"] == ["000000.png", "000001.png", "000002.png"]
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    other_options = missing_of(class_drawing={"strip": True})
    for wrong, base, text in [
        (other, "base", "prompt was 'a photo of a dog' and is 'a cat'; choose another folder, delete"),
        (missing, "new", "2 class images that were generated differently: base was 'base' and is 'new'; choose"),
        (other_options, "base", r"options was \{\} and is \{'strip': True\}; .* or delete drawn.json to keep them"),
    ]:
        with pytest.raises(UserError, match=text):
            wrong.claim(base)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    record.write_text("[")
    with pytest.raises(UserError, match=r"class/drawn.json' is not JSON"):
        other.claim("base")
    record.unlink()
    other.claim("base")
