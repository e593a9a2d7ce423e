"""What would lose data or train on wrong data is refused or reported in one line."""

import fcntl
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffengine import cli
from diffengine.engine import checkpoint
from diffengine.engine.hooks import Hook
from diffengine.engine.state import read_whole
from diffengine.report.read import read_lines
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
    line = "warning: 10 captions are longer than 64 tokens; the longest has 65 and loses its last 1 word: 'x'"
    assert (line in (tmp_path / "log.txt").read_text()) == warned


# ------------------------------------------------------------------------------------------------ the disk

FULL = "No space left on device"


class Harm(Hook):
    """Does something to the disk after the second step, before any other hook sees that step."""

    priority = "HIGHEST"

    def __init__(self, work: str, name: str) -> None:
        self.work, self.name = work, name

    def after_step(self, run: Any, step: Any) -> None:
        if run.clock.done == (3 if "tensorboard" in self.name else 2):  # its file is opened at step 2
            getattr(self, self.work)(run.work_dir)

    def after_train(self, run: Any) -> None:
        if self.work == "weights":
            _limit_files(100_000)

    def weights(self, work_dir: Path) -> None:
        """Let the exported weights not fit, after training."""

    def line(self, work_dir: Path) -> None:
        """Let a line of metrics.jsonl be cut off."""
        _limit_files((work_dir / "metrics.jsonl").stat().st_size + 10)

    def link(self, work_dir: Path) -> None:
        """Let a file that is about to be opened be on a full disk."""
        path = work_dir / self.name
        path.parent.mkdir(exist_ok=True)
        for file in [path] if "*" not in self.name else path.parent.glob(path.name):
            file.unlink(missing_ok=True)
            file.symlink_to("/dev/full")

    def fill(self, work_dir: Path) -> None:
        """Let a file that is open be on a full disk."""
        full = os.open("/dev/full", os.O_WRONLY)
        for link in Path("/proc/self/fd").iterdir():
            if os.path.lexists(link) and f"{work_dir}/{self.name}" in os.readlink(link):
                os.dup2(full, int(link.name))
        os.close(full)

    def remove(self, work_dir: Path) -> None:
        shutil.rmtree(work_dir)

    def replace(self, work_dir: Path) -> None:
        shutil.rmtree(work_dir)
        work_dir.write_text("a file")


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


SETTINGS: dict[str, Any] = {"max_iters": 3, "prompts": ["a cat"], "preview_every": 2, "checkpoint_every": 1,
                            "default_hooks": {}}  # fmt: skip


@pytest.fixture(scope="module")
def first_step(toy: Toy) -> Path:
    """The work dir of a run after its first step."""
    work_dir = toy.root / "first_step"
    assert train(toy.config("harmed", **SETTINGS), work_dir, "--cfg-options", "max_iters=1") == 0
    return work_dir


@pytest.fixture
def limits() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize(
    ("work", "name", "saved", "message"),
    [
        ("line", "", 1, "cannot read or write a file: File too large; free space or fix the permissions"),
        ("fill", "log.txt", 1, f"cannot read or write a file: {FULL}; free space or fix the permissions"),
        ("link", "tensorboard/*", 2, f"cannot read or write a file: {FULL}; free space or fix the permissions"),
        ("link", ".iter_2.pth.tmp", 1, "cannot write checkpoint '"),
        ("link", "previews/.000002.png.tmp", 1, f"cannot read or write a file: {FULL}"),
        ("link", "previews/000002/.00.webp.tmp", 1, f"cannot read or write a file: {FULL}"),
        ("link", ".before_after.png.tmp", 3, f"cannot read or write a file: {FULL}"),
        ("weights", "", 3, "cannot write to '"),
        ("link", ".report.html.tmp", 3, None),
        ("link", ".run.json.tmp", 3, None),
        ("remove", "", 0, "cannot read or write '"),
        ("replace", "", 0, "cannot read or write '"),
    ],
)
def test_an_error_of_the_disk_ends_a_run_in_one_line(
    toy: Toy,
    first_step: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    work: str,
    name: str,
    saved: int,
    message: str | None,
) -> None:
    """It can be resumed: the last checkpoint is whole. The page alone is no reason to stop."""
    work_dir = Path(shutil.copytree(first_step, tmp_path / "run"))
    hook = {"type": "tests.engine.test_harm.Harm", "work": work, "name": name}
    capsys.readouterr()
    code = train(str(first_step.parent / "harmed.py"), work_dir, "--resume", "--cfg-options", f"custom_hooks=[{hook}]")
    lines = error_of(capsys).splitlines()
    if message is None:
        assert (code, lines) == (0, [])
        assert f"the run's page was not written: OSError: [Errno 28] {FULL}" in (work_dir / "log.txt").read_text()
    else:
        assert code == 2, lines
        assert [line.startswith(f"diffengine train: error: {message}") for line in lines] == [True], lines
    if not saved:
        return
    assert not [path for path in work_dir.rglob(".*") if path.name.endswith(".tmp")]
    newest = checkpoint.newest(work_dir)
    assert newest is not None
    assert read_whole(newest)["counters"]["iter"] in (saved, saved + ("tensorboard" in name))  # a thread writes it


def test_a_run_continues_with_damaged_metrics(toy: Toy, tmp_path: Path) -> None:
    """For example after a power cut, or a disk that was full."""
    hook = {"type": "tests.engine.test_harm.Damage"}
    path = toy.config("damage", max_iters=2, data=str(toy.data), validation_data=str(toy.data), validation_every=2)
    assert train(path, tmp_path, "--cfg-options", "max_iters=1", "validation_every=0") == 0
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"iter": 1, "loss": \xff}\n' + b"\0" * 64)
    assert train(path, tmp_path, "--resume", "--cfg-options", f"custom_hooks=[{hook}]") == 0
    log = (tmp_path / "log.txt").read_text()
    assert "warning: metrics.jsonl is damaged: 2 lines were left out" in log
    lines, damaged = read_lines(tmp_path / "metrics.jsonl")
    assert [line["iter"] for line in lines if "loss" in line] == [1, 2]
    assert damaged == 1


class Damage(Hook):
    """Damages metrics.jsonl while the run reads it, too."""

    priority = "HIGHEST"

    def after_step(self, run: Any, step: Any) -> None:
        with (run.work_dir / "metrics.jsonl").open("ab") as file:
            file.write(b'{"iter": 1, "val/loss": 0.1}\n{"iter": 1, "va\xff\n')
