"""A work dir that version 0.1.0 wrote still works; its token cache, which has no checksums, is built again."""

import shutil
from pathlib import Path

import pytest
from diffusers import UVit2DModel

from diffengine.cli import main
from diffengine.engine import checkpoint
from tests.engine import runs
from tests.engine.runs import train

FIXTURE = Path(__file__).parent / "fixtures" / "v0.1.0"
WORK_DIR = Path("work_dirs/tiny")
RESUME = ["tiny.py", WORK_DIR, "--resume", "--cfg-options", "max_iters=6"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A writable copy as the current folder, because the config has relative paths."""
    shutil.copytree(FIXTURE, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def test_old_run_resumes(capfd: pytest.CaptureFixture[str]) -> None:
    (captions,) = Path("work_dirs/cache").rglob("captions.arrow")
    old = captions.read_bytes()
    assert train(*RESUME) == 0
    output = capfd.readouterr().out
    assert "resumed work_dirs/tiny/iter_4.pth at step 4" in output
    for table in ("pictures", "captions"):
        assert (
            f"token cache: '{captions.with_stem(table).with_suffix('.json')}' was written by another version" in output
        )
    assert captions.read_bytes() == old
    assert [line["iter"] for line in runs.metrics(WORK_DIR)] == [1, 2, 4, 6]
    state = checkpoint.read(WORK_DIR / "iter_6.pth")
    assert state["counters"] == {"iter": 6, "epoch": 4}
    assert state["ema"]["updates"] == 6
    UVit2DModel.from_pretrained(WORK_DIR, subfolder="transformer")


def test_old_config_trains_again() -> None:
    assert train(str(WORK_DIR / "config.py"), WORK_DIR) == 2  # the folder holds a run
    assert train(str(WORK_DIR / "config.py"), WORK_DIR, "--overwrite") == 0


@pytest.mark.parametrize("flags", [[], ["--ema"]])
def test_old_checkpoint_converts(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "tiny.py", str(WORK_DIR / "iter_4.pth"), "out", *flags]) == 0
    assert "wrote out/transformer" in capsys.readouterr().out
    assert main(["convert", str(WORK_DIR), "--pipeline", *flags]) == 0
    assert main(["sample", str(WORK_DIR), "a box on red paper", "--steps", "2"]) == 0
