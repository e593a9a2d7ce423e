"""Which images are held out of training."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from diffengine.datasets import ImageTextDataset, Stream, SubjectDataset, WrappedDataset, hold_out
from diffengine.errors import UserError
from tests.support import photos


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    photos.write_photo_folder(folder, 40, 24, "txt")
    return folder


def names(dataset: ImageTextDataset, indices: list[int]) -> set[str]:
    return {Path(dataset._rows[index]["image"]["path"]).name for index in indices}


def test_a_share_of_at_least_8_and_at_most_64(folder: Path) -> None:
    dataset = ImageTextDataset(str(folder))
    split = hold_out(dataset, 0.05)
    assert len(split.held_out) == 8
    assert split.train is not None
    assert sorted([*split.train, *split.held_out]) == list(range(40))
    assert len(split.twin) == 32
    assert set(split.twin) == set(split.train)
    assert len(hold_out(dataset, 0.5).held_out) == 20
    many = WrappedDataset(
        [{"image": Image.new("RGB", (2, 2), (n % 256, n // 256, 0)), "text": ""} for n in range(2000)]
    )
    assert len(hold_out(many, 0.05).held_out) == 64


def test_nothing_is_held_out_of_few_images_or_if_not_asked(folder: Path) -> None:
    dataset = ImageTextDataset(str(folder))
    for split in (hold_out(WrappedDataset(dataset, range(31)), 0.05), hold_out(dataset, 0.0)):
        assert (split.train, split.held_out) == (None, [])
        assert len(split.twin) > 8
    with pytest.raises(UserError, match=r"validation_share got 1\.5; expected a number from 0, below 1"):
        hold_out(dataset, 1.5)


def test_duplicates_fall_on_one_side_and_the_split_survives_added_images(folder: Path, tmp_path: Path) -> None:
    before = ImageTextDataset(str(folder))
    held_out = names(before, hold_out(before, 0.05).held_out)
    larger = Path(shutil.copytree(folder, tmp_path / "larger"))
    for file in sorted(folder.glob("*.[pj]*")):
        shutil.copy(file, larger / f"copy of {file.name}")
        shutil.copy(file.with_suffix(".txt"), larger / f"copy of {file.stem}.txt")
    doubled = ImageTextDataset(str(larger))
    assert names(doubled, hold_out(doubled, 0.05).held_out) == held_out | {f"copy of {name}" for name in held_out}
    for number in range(20):
        Image.new("RGB", (24, 24), (number, 7, 9)).save(larger / f"new {number}.png")
        (larger / f"new {number}.txt").write_text("new")
    added = ImageTextDataset(str(larger))
    kept = {name for name in names(added, hold_out(added, 0.05).held_out) if not name.startswith("new")}
    assert kept <= held_out | {f"copy of {name}" for name in held_out}  # no image changes from trained to held out


def test_only_the_beginning_of_files_is_read(tmp_path: Path) -> None:
    for name, colour in (("a", 1), ("b", 2), ("c", 2)):
        Image.new("RGB", (256, 256), (colour, 0, 0)).save(tmp_path / f"{name}.bmp")  # 197 kB
        (tmp_path / f"{name}.txt").write_text(name)
    dataset = ImageTextDataset(str(tmp_path))
    first, second, third = (dataset.content(index) for index in range(3))
    assert len(first) == 8 + 65536
    assert first != second == third


def test_few_images_are_read_if_nothing_is_held_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    content = ImageTextDataset.content
    monkeypatch.setattr(ImageTextDataset, "content", lambda self, index: read.append(index) or content(self, index))
    monkeypatch.setattr("diffengine.datasets.split.MOST", 10)
    assert len(hold_out(ImageTextDataset(str(folder)), 0.0).twin) == len(read) == 10
    read.clear()
    hold_out(ImageTextDataset(str(folder)), 0.05)
    assert len(read) == 40


def test_images_of_a_subject_are_all_trained(folder: Path) -> None:
    split = hold_out(SubjectDataset(str(folder), instance_prompt="sks"), 0.5)
    assert (split.train, split.held_out, split.twin) == (None, [], [])


def test_an_epoch_takes_each_trained_image_once(folder: Path) -> None:
    dataset = ImageTextDataset(str(folder))
    split = hold_out(dataset, 0.25)
    stream = Stream(dataset, [], [], seed=1, split=split)
    assert len(stream) == 30
    for epoch in range(2):
        located = [stream.locate(epoch * 30 + number) for number in range(30)]
        assert {found for found, _ in located} == {epoch}
        assert sorted(index for _, index in located) == split.train
