"""The work dir: its layout, and which files are never deleted."""

from pathlib import Path

import pytest

from diffengine.engine.workdir import claimed, holds_run
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
        "before_after.png", "config.py", "iter_2.pth", "log.txt", "metrics.jsonl", "previews", "report", "report.html",
        "run.json", "tensorboard", "transformer",
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
        "config.py", "epoch.pth", "images", "iter_2.pth", "log.txt", "metrics.jsonl", "notes.txt", "report",
        "report.html", "run.json", "tensorboard", "transformer", "vae.pth",
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
