import json
from pathlib import Path

import pytest
from PIL import Image

from diffengine.datasets import Stream, SubjectDataset, collate
from diffengine.errors import UserError
from tests.support.photos import all_captions


def write(folder, names, size=(8, 6)):
    """Writes a plain image for each name. Its red value is ten times its index."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        Image.new("RGB", size, (10 * index, 0, 0)).save(folder / name)
    return str(folder)


@pytest.fixture
def dogs(tmp_path):
    """Three images of the subject, one with a caption that must not be used, and five of its class."""
    data = write(tmp_path / "mine", ["a.png", "b.png", "c.png"])
    (tmp_path / "mine" / "a.txt").write_text("not this caption")
    return data, write(tmp_path / "class", [f"{index}.png" for index in range(5)], (4, 4))


def subject(dogs, **options):
    return SubjectDataset(
        dogs[0], "a photo of sks dog",
        **{"class_data": dogs[1], "class_prompt": "a photo of a dog", "num_class_images": 4, **options},
    )  # fmt: skip


def indices(samples):
    return [sample["image"].getpixel((0, 0))[0] // 10 for sample in samples]


def test_subject_and_class_alternate_and_the_shorter_one_repeats(dogs):
    dataset = subject(dogs, prior_loss_weight=0.5)
    assert len(dataset) == 8
    samples = [dataset[index] for index in range(8)]
    assert indices(samples[::2]) == [0, 1, 2, 0]
    assert indices(samples[1::2]) == [0, 1, 2, 3]  # the first four of five
    assert {(sample["text"], sample["weight"]) for sample in samples[::2]} == {("a photo of sks dog", 1.0)}
    assert {(sample["text"], sample["weight"]) for sample in samples[1::2]} == {("a photo of a dog", 0.5)}
    assert [dataset.size(index) for index in (0, 1)] == [(8, 6), (4, 4)]
    assert all_captions(dataset) == ["a photo of sks dog"] * 3 + ["a photo of a dog"] * 4
    few = subject(dogs, num_class_images=2)
    assert len(few) == 6
    assert indices(few[index] for index in range(1, 6, 2)) == [0, 1, 0]


def test_half_of_an_epoch_is_class_images(dogs):
    stream = Stream(subject(dogs), [], [], seed=3)
    batch = collate([{**stream[position], "image": None} for position in range(8)])
    assert sorted(batch["text"]) == ["a photo of a dog"] * 4 + ["a photo of sks dog"] * 4
    assert batch["weight"] == [1.0] * 8


def test_without_class_images(dogs):
    dataset = SubjectDataset(dogs[0], "sks")
    assert len(dataset) == 3
    assert indices(dataset[index] for index in range(3)) == [0, 1, 2]
    assert all_captions(dataset) == ["sks"] * 3
    assert dataset.missing_images() is None


def test_missing_images_have_the_first_free_numbers(dogs, tmp_path):
    assert subject(dogs, num_class_images=5).missing_images().numbers == []
    folder = Path(dogs[1])
    Image.new("RGB", (4, 4)).save(folder / "000001.png")
    (folder / ".000000.png.tmp").write_bytes(b"half of one")
    (folder / "note.txt").write_text("no image")
    options = {"guidance_scale": 4.0}
    missing = subject(dogs, num_class_images=9, class_drawing=options).missing_images()
    assert (missing.folder, missing.prompt, missing.options) == (folder, "a photo of a dog", options)
    assert missing.numbers == [0, 2, 3]  # five images and 000001.png exist
    absent = subject((dogs[0], str(tmp_path / "new" / "class")), num_class_images=2)
    assert absent.missing_images().numbers == [0, 1]
    assert len(absent) == 6
    assert len(all_captions(absent)) == 5


def test_class_images_are_searched_when_read(dogs, tmp_path):
    folder = tmp_path / "later"
    dataset = subject((dogs[0], str(folder)), num_class_images=2)
    assert dataset[0]["text"] == "a photo of sks dog"
    with pytest.raises(UserError, match=r"later lacks 2 of 2 class images; .* or lower num_class_images"):
        dataset[1]
    write(folder, ["000000.png", "000001.png"])
    assert dataset[1]["text"] == "a photo of a dog"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"class_prompt": None}, "class_prompt=None; expected both, or neither"),
        ({"class_data": None}, "class_data=None and class_prompt='a photo of a dog'; expected both"),
        ({"prior_loss_weight": 0}, "prior_loss_weight got 0; expected a number above 0"),
        ({"num_class_images": 0}, "num_class_images got 0; expected at least 1"),
    ],
)
def test_wrong_options(dogs, options, text):
    with pytest.raises(UserError, match=text):
        subject(dogs, **options)


def test_wrong_folders(dogs, tmp_path):
    for folders in [(dogs[0], str(Path(dogs[0], "class"))), (dogs[0], str(tmp_path)), (dogs[0], dogs[0])]:
        with pytest.raises(UserError, match="one inside the other; expected separate folders"):
            subject(folders)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file', which is not a folder"):
        subject((dogs[0], str(tmp_path / "file"))).missing_images()


def test_generated_images_are_reused_only_with_the_same_settings(dogs):
    folder = Path(dogs[1])
    record = folder / "drawn.json"
    subject(dogs, num_class_images=5).missing_images().claim("base")  # the user's own images, none missing
    assert not record.exists()
    missing = subject(dogs, num_class_images=7).missing_images()
    missing.claim("base")
    settings = {"prompt": "a photo of a dog", "base": "base", "options": {}}
    assert json.loads(record.read_text()) == {**settings, "pictures": ["000000.png", "000001.png"]}
    other = subject(dogs, class_prompt="a cat").missing_images()
    other.claim("base")  # none is generated yet
    write(folder, ["000000.png", "000001.png"])
    missing = subject(dogs, num_class_images=8).missing_images()
    missing.claim("base")
    assert json.loads(record.read_text())["pictures"] == ["000000.png", "000001.png", "000002.png"]
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    other_options = subject(dogs, class_drawing={"strip": True}).missing_images()
    for wrong, base, text in [
        (other, "base", "prompt was 'a photo of a dog' and is 'a cat'; choose another class_data, delete"),
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
