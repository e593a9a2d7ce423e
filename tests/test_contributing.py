"""CONTRIBUTING.md, followed: its files are written to a folder outside the package, and its commands run there."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UVit2DModel
from peft import PeftModel

from diffengine import cli
from diffengine.engine import checkpoint
from tests.engine.runs import Toy, metrics

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TEXT, flags=re.DOTALL))

QUIET = ["preview_every=None", "validation_every=0"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The examples' files, in the current folder; their modules are forgotten at the end."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)


def test_the_examples() -> None:
    assert set(FILES) == {
        "colours.py", "learn_colours.py", "best.py", "watch_loss.py", "palette.py", "learn_palette.py", "ia3.py",
    }  # fmt: skip


def test_a_data_set(folder: Path) -> None:
    few = ["max_iters=2", "log_every=1", "batch_size=4", "num_workers=0", *QUIET]
    assert cli.main(["train", "learn_colours.py", "--cfg-options", *few]) == 0
    work_dir = folder / "work_dirs/learn_colours"
    assert [line["iter"] for line in metrics(work_dir)] == [1, 2]
    assert "20 images" in (work_dir / "log.txt").read_text()


def test_a_hook(folder: Path) -> None:
    few = [
        "log_every=1",
        "batch_size=4",
        "num_workers=0",
        "preview_every=None",
        "validation_every=0",
        "checkpoint_every=5",
    ]
    train = ["train", "watch_loss.py", "--cfg-options", *few]
    assert cli.main([*train, "max_iters=10"]) == 0
    work_dir = folder / "work_dirs/watch_loss"
    losses = [line["loss"] for line in metrics(work_dir)]
    lowest = checkpoint.read(work_dir / "iter_10.pth")["lowest_loss"]
    assert len(losses) == 10
    assert lowest == pytest.approx(min(losses), rel=1e-6)
    assert f"lowest loss {lowest:.3f}" in (work_dir / "log.txt").read_text()
    whole = checkpoint.read(work_dir / "iter_10.pth")
    (work_dir / "iter_10.pth").unlink()
    assert cli.main([*train, "max_iters=10", "--resume"]) == 0
    resumed = checkpoint.read(work_dir / "iter_10.pth")
    assert resumed["lowest_loss"] == lowest
    shutil.rmtree(work_dir)
    assert cli.main([*train, "max_iters=10", "custom_hooks=[]"]) == 0
    without = checkpoint.read(work_dir / "iter_10.pth")["model"]
    assert all(torch.equal(without[name], tensor) for name, tensor in whole["model"].items())


def test_a_hook_that_is_added_on_a_resume(folder: Path) -> None:
    few = ["log_every=1", "batch_size=4", "num_workers=0", *QUIET]
    train = ["train", "watch_loss.py", "--cfg-options", *few]
    assert cli.main([*train, "max_iters=2", "custom_hooks=[]"]) == 0
    assert cli.main([*train, "max_iters=4", "--resume"]) == 0
    work_dir = folder / "work_dirs/watch_loss"
    losses = [line["loss"] for line in metrics(work_dir)]
    lowest = checkpoint.read(work_dir / "iter_4.pth")["lowest_loss"]
    assert lowest == pytest.approx(min(losses[2:]), rel=1e-6)


@pytest.mark.soak
def test_a_hook_adds_up_all_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ["log_every=1", "batch_size=4", "num_workers=0", *QUIET, "max_iters=2"]
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    command = [sys.executable, "-m", "diffengine", "train", "watch_loss.py", "--cfg-options", *few]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    work_dir = folder / "work_dirs/watch_loss"
    losses = [line["loss"] for line in metrics(work_dir)]
    lowest = checkpoint.read(work_dir / "iter_2.pth")["lowest_loss"]
    assert lowest == pytest.approx(min(losses), rel=1e-6)


def test_a_model(folder: Path) -> None:
    assert cli.main(["train", "learn_palette.py", "--cfg-options", "log_every=50"]) == 0
    work_dir = folder / "work_dirs/learn_palette"
    assert metrics(work_dir)[-1]["loss"] < 0.01
    assert {path.name for path in (work_dir / "palette").iterdir()} >= {"config.json"}
    convert = ["convert", "learn_palette.py", str(work_dir / "iter_100.pth"), "out"]
    assert cli.main(convert) == 0
    from palette import Palette  # type: ignore[import-not-found]

    learnt = Palette.from_pretrained("out", subfolder="palette").state_dict()
    trained = checkpoint.read(work_dir / "iter_100.pth")["model"]
    assert torch.equal(learnt["colours.weight"], trained["palette.colours.weight"])


def test_a_models_checkpoint_does_not_import_it(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", "learn_palette.py", "--cfg-options", "train_cfg.max_iters=1"]) == 0
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)
    assert cli.main(["convert", "work_dirs/learn_palette"]) == 2
    assert "palette.PaletteModel" in capsys.readouterr().err
    assert "palette" not in sys.modules


def test_a_way_to_fine_tune(folder: Path, toy: Toy) -> None:
    options = [
        "resolution=32",
        "max_iters=2",
        "batch_size=2",
        "num_workers=0",
        "preview_every=None",
        "validation_every=0",
        "prompts=[]",
    ]
    sources = ["--pretrained", str(toy.model), "--data", str(toy.data)]
    assert cli.main(["train", "ia3.py", *sources, "--cfg-options", *options]) == 0
    adapter = folder / "work_dirs/ia3/transformer"
    base = UVit2DModel.from_pretrained(toy.model, subfolder="transformer")
    model = PeftModel.from_pretrained(base, adapter)
    assert model.peft_config["default"].peft_type.value == "IA3"
