"""What would lose data or train on wrong data is refused or reported in one line."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from diffengine import cli
from tests.engine.runs import Toy, build, train


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_a_work_dir_is_locked_by_one_process(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = toy.config("locked")
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    assert train(path, tmp_path) == 2
    assert "another process is training in" in error_of(capsys)
    os.close(folder)
    assert train(path, tmp_path) == 0


def test_a_work_dir_inside_the_image_folder_is_refused(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(toy.data, tmp_path / "photos")
    path = toy.config("inside", data=str(tmp_path / "photos"))
    assert train(path, tmp_path / "photos" / "run") == 2
    assert "lies inside the data" in error_of(capsys)


def test_a_damaged_checkpoint_is_not_used(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = toy.config("damaged")
    assert train(path, tmp_path) == 0
    checkpoint = tmp_path / "iter_1.pth"
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    for command in (
        ["convert", path, str(checkpoint), str(tmp_path / "out")],
        ["train", path, "--work-dir", str(tmp_path), "--resume", "--cfg-options", "max_iters=2"],
    ):
        assert cli.main(command) == 2
        assert "is damaged" in error_of(capsys)


def test_a_run_does_not_resume_with_other_data(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = tmp_path / "photos"
    shutil.copytree(toy.data, data)
    path = toy.config("shrunk", data=str(data), max_iters=1)
    assert train(path, tmp_path / "run") == 0
    lines = (data / "metadata.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (data / lines[-1].split(",")[0]).unlink()
    (data / "metadata.csv").write_text("".join(lines[:-1]), encoding="utf-8")
    assert train(path, tmp_path / "run", "--resume", "--cfg-options", "max_iters=2") == 2
    assert "the data had 10 images and has 9" in error_of(capsys)


def test_a_folder_of_another_program_is_not_touched(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    notes = tmp_path / "transformer" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    assert train(toy.config("foreign"), tmp_path) == 2
    assert "which no run wrote;" in error_of(capsys)
    assert notes.read_text() == "mine"


@pytest.mark.parametrize(("letters", "warned"), [(62, False), (63, True)])
def test_truncated_captions_are_reported(toy: Toy, tmp_path: Path, letters: int, warned: bool) -> None:
    """The toy model takes 64 tokens: the start, the end, and one for each letter here."""
    caption = " ".join("x" * letters)
    run = build(toy.config("long"), tmp_path, f"train_dataloader.dataset.caption={caption}")
    run.announce()
    line = "10 captions: 10 are longer than 64 tokens and are cut there; the longest has 65\n"
    assert (line in (tmp_path / "log.txt").read_text()) == warned


@pytest.mark.parametrize("name", ["log.txt", "previews/.000002.png.tmp"])
def test_a_full_disk_ends_a_run_in_one_line(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    path = toy.config("filled", prompts=["a cat"])
    assert train(path, tmp_path) == 0
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/dev/full")
    capsys.readouterr()
    assert train(path, tmp_path, "--resume", "--cfg-options", "max_iters=2") == 2
    expected = "diffengine train: error: cannot read or write a file: No space left on device; free space or fix"
    (line,) = error_of(capsys).splitlines()
    assert line.startswith(expected)
