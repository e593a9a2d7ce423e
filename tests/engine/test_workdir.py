"""The work dir: its layout, and which files are never deleted."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffengine.engine import checkpoint
from diffengine.engine.workdir import TITLE, begin, claimed, holds_run
from diffengine.errors import UserError
from tests.engine import runs
from tests.engine.runs import Toy, assert_equal_checkpoints, train


def claim(work_dir: Path, resume: str | None, overwrite: bool) -> Path | None:
    """The checkpoint that a run in this work dir would resume from."""
    with claimed(work_dir, resume, overwrite) as path:
        return path


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_layout_and_a_run_from_the_saved_config(toy: Toy, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    path = toy.config("layout", default_hooks={}, max_iters=2, prompts=1)
    assert train(path, first, "--cfg-options", "batch_size=5") == 0
    assert _names(first) == [
        "before_after.png", "config.py", "diffengine.json", "iter_2.pth", "log.txt", "metrics.jsonl", "previews",
        "report", "report.html", "run.json", "tensorboard", "transformer",
    ]  # fmt: skip
    assert _names(first / "previews") == [
        "000000", "000000.png", "000002", "000002.png", "original", "prompts.json", "round_trip",
    ]  # fmt: skip
    assert _names(first / "previews" / "000002") == _names(first / "previews" / "round_trip") == ["00.webp"]
    assert _names(first / "transformer") == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert (first / "config.py").read_text().startswith("# layout, as it was trained.")
    assert train(str(first / "config.py"), second) == 0
    assert_equal_checkpoints(first / "iter_2.pth", second / "iter_2.pth")


def test_a_run_is_overwritten_only_with_the_flag(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = toy.config("again", default_hooks={})
    assert train(path, tmp_path) == 0
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in _names(tmp_path)}
    assert train(path, tmp_path) == 2
    error = capsys.readouterr().err
    assert "--resume" in error
    assert "--work-dir" in error
    assert "--overwrite" in error
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in _names(tmp_path)} == before

    for name in ("notes.txt", "vae.pth", "epoch.pth"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "images").mkdir()
    (tmp_path / "iter_99.pth").write_bytes(b"of the old run")
    (tmp_path / "transformer" / "left.txt").write_text("of the old run's export")
    assert train(path, tmp_path, "--overwrite", "--cfg-options", "prompts=[]", "max_iters=2") == 0
    assert _names(tmp_path) == [
        "config.py", "diffengine.json", "epoch.pth", "images", "iter_2.pth", "log.txt", "metrics.jsonl", "notes.txt",
        "report", "report.html", "run.json", "tensorboard", "transformer", "vae.pth",
    ]  # fmt: skip
    assert not (tmp_path / "transformer" / "left.txt").exists()
    assert [line["iter"] for line in runs.metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["config.py", "previews", "log.txt", "model_index.json", "transformer/config.json"])
def test_a_folder_with_other_files_is_refused(tmp_path: Path, name: str, overwrite: bool) -> None:
    """For example a project with a config.py or a model folder, which a run would overwrite."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds '{name.partition('/')[0]}', which no run wrote"):
        claim(tmp_path, None, overwrite)
    assert (tmp_path / name).read_text() == "mine"


def _write_deep(path: Path) -> None:
    path.write_text("[" * 10**5)


@pytest.mark.parametrize("make", [os.mkfifo, _write_deep])
def test_a_note_that_no_run_wrote_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "diffengine.json")
    with pytest.raises(UserError, match=r"holds 'diffengine.json', which no run wrote; move it away"):
        claim(tmp_path, None, overwrite=True)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    begin(tmp_path, {}, "x", resumed=False, components=[])
    os.mkfifo(tmp_path / "log.txt")
    with pytest.raises(UserError, match=r"log.txt' is a pipe; expected a file: move it away$"):
        begin(tmp_path, {}, "x", resumed=True, components=[])


def test_the_work_dir_is_created_and_must_not_be_a_file(tmp_path: Path) -> None:
    assert claim(tmp_path / "a" / "b", None, False) is None
    assert (tmp_path / "a" / "b").is_dir()
    assert not holds_run(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use work dir"):
        claim(tmp_path / "file", None, False)


def test_resume_without_a_checkpoint_starts_from_the_beginning(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train(toy.config("fresh", default_hooks={}), tmp_path, "--resume") == 0
    assert "has no checkpoint yet; starting from the beginning" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"nowhere.pth' does not exist"):
        claim(tmp_path / "other", str(tmp_path / "nowhere.pth"), False)


def test_an_invalid_config_does_not_delete_the_old_run(toy: Toy, tmp_path: Path) -> None:
    path = toy.config("kept", default_hooks={})
    assert train(path, tmp_path) == 0
    before = _names(tmp_path)
    for option in (
        "micro_batch_size=0",
        "clip_grad=-1.0",
        "warmup_iters=5",
        "keep_checkpoints=0",
        "resolution=30",
    ):
        assert train(path, tmp_path, "--overwrite", "--cfg-options", option) == 2, option
        assert _names(tmp_path) == before


# ------------------------------------------------------------------------------------------------ ownership

CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir"}
STEP_1: dict[str, Any] = {"format": checkpoint.FORMAT, "counters": {"iter": 1}}


def old_run(work_dir: Path) -> Path:
    """A run's files, without training."""
    begin(work_dir, {"seed": 0}, "old", False, ["transformer"])
    for name in ("log.txt", "metrics.jsonl", "run.json", "previews/000000.png", "transformer/config.json"):
        (work_dir / name).parent.mkdir(exist_ok=True)
        (work_dir / name).write_text("old")
    checkpoint.write(work_dir / "iter_1.pth", STEP_1)
    return work_dir


def _killed_at(number: int, work_dir: Path) -> bool:
    """Start over in a work dir, in a process that ends before its n-th change to files; whether it came that far."""
    child = os.fork()
    if child == 0:
        left = iter(range(number - 1))
        sys.addaudithook(lambda event, _: os._exit(9) if event in CHANGES and next(left, None) is None else None)
        begin(work_dir, {"seed": 1}, "new", False, ["transformer", "text_encoder"])
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_kill_at_any_moment_of_clearing_leaves_a_usable_folder(tmp_path: Path) -> None:
    for number in range(1, 100):
        work_dir = old_run(tmp_path / str(number))
        killed = _killed_at(number, work_dir)
        assert claim(work_dir, None, True) is None
        assert claim(work_dir, "newest", False) == checkpoint.newest(work_dir)
        begin(work_dir, {"seed": 1}, "new", False, ["transformer", "text_encoder"])
        assert _names(work_dir) == ["config.py", "diffengine.json"]
        if not killed:
            break
    assert 10 < number < 99


def test_a_kill_at_any_moment_of_the_first_start_leaves_a_usable_folder(tmp_path: Path) -> None:
    for number in range(1, 100):
        killed = _killed_at(number, tmp_path / str(number))
        assert claim(tmp_path / str(number), None, False) is None
        if not killed:
            break
    assert 3 < number < 99


def test_a_work_dir_of_an_older_version_is_overwritten(tmp_path: Path) -> None:
    old_run(tmp_path)
    (tmp_path / "diffengine.json").unlink()
    assert TITLE in (tmp_path / "config.py").read_text()
    assert claim(tmp_path, None, True) is None
    begin(tmp_path, {"seed": 1}, "new", False, ["transformer"])
    assert _names(tmp_path) == ["config.py", "diffengine.json"]


def test_names_outside_of_the_folder_are_never_ours(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    work_dir = old_run(tmp_path / "run")
    (work_dir / "diffengine.json").write_text(json.dumps({"owns": ["../mine", "..", "", "previews/000000.png"]}))
    with pytest.raises(UserError, match=r"holds 'metrics\.jsonl', which no run wrote; move it away, or choose"):
        claim(work_dir, None, True)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", ["previews", "transformer", "iter_1.pth", "config.py", "log.txt", "diffengine.json"])
def test_a_link_is_deleted_and_not_what_it_points_to(tmp_path: Path, name: str) -> None:
    work_dir, target = old_run(tmp_path / "run"), tmp_path / "target"
    (work_dir / name).rename(target)
    before = sorted((path, path.is_file() and path.read_bytes()) for path in [target, *target.rglob("*")])
    (work_dir / name).symlink_to(target)
    claim(work_dir, None, True)
    begin(work_dir, {"seed": 1}, "new", False, ["transformer"])
    assert _names(work_dir) == ["config.py", "diffengine.json"]
    assert not any(path.is_symlink() for path in work_dir.iterdir())
    assert sorted((path, path.is_file() and path.read_bytes()) for path in [target, *target.rglob("*")]) == before


@pytest.mark.parametrize("resumed", [False, True])
def test_temporary_files_of_others_are_kept(tmp_path: Path, resumed: bool) -> None:
    old_run(tmp_path)
    others = [".mine.tmp", "x.tmp", ".video.mp4.partial", ".cache.tmp"]
    for name in [*others, ".iter_2.pth.tmp", ".best.pth.tmp", ".metrics.jsonl.tmp"]:
        (tmp_path / name).write_text("half")
    begin(tmp_path, {"seed": 0}, "new", resumed, ["transformer"])
    assert sorted(name for name in _names(tmp_path) if name.endswith((".tmp", ".partial"))) == sorted(others)


def test_a_folder_of_another_component_is_kept(tmp_path: Path) -> None:
    """The run that is overwritten never wrote it."""
    old_run(tmp_path)
    shutil.copytree(tmp_path / "transformer", tmp_path / "text_encoder")
    with pytest.raises(UserError, match="holds 'text_encoder', which no run wrote"):
        begin(tmp_path, {"seed": 0}, "new", False, ["transformer", "text_encoder"])
    assert (tmp_path / "iter_1.pth").exists()


@pytest.mark.parametrize(
    ("flags", "setting"),
    [
        (["--pretrained", "{run}"], "model.pretrained"),
        (["--init-from", "{run}/iter_1.pth"], "--init-from"),
        (["--data", "{run}/previews"], "train_dataloader.dataset.path"),
        (["--cfg-options", "validation_data={run}/previews"], "default_hooks.validation.data"),
        (["--cfg-options", "cache_path={run}/previews/cache"], "token_cache.path"),
    ],
)
def test_a_run_does_not_delete_what_it_starts_from(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], setting: str
) -> None:
    work_dir, path = tmp_path / "run", toy.config("self", default_hooks={"report": None})
    begin(work_dir, {"seed": 0}, "old", False, ["transformer"])
    for item in toy.model.iterdir():  # as `convert --pipeline` leaves it
        shutil.copytree(item, work_dir / item.name) if item.is_dir() else shutil.copy(item, work_dir)
    (work_dir / "diffengine.json").unlink()  # so that all of it is ours
    shutil.copytree(toy.data, work_dir / "previews")
    if "--init-from" in flags:
        assert train(path, tmp_path / "other") == 0
        shutil.copy(tmp_path / "other" / "iter_1.pth", work_dir)
    before = sorted(work_dir.rglob("*"))
    capsys.readouterr()
    assert train(path, work_dir, "--overwrite", *(flag.format(run=work_dir) for flag in flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"diffengine train: error: {setting} got '{work_dir}")
    assert line.endswith(f"is of the run in '{work_dir}', which would be deleted; choose another --work-dir")
    assert sorted(work_dir.rglob("*")) == before
