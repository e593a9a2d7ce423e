"""TensorBoard and Weights & Biases."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config

from diffengine.engine.backends import TensorboardBackend, WandbBackend
from tests.engine.runs import Toy, train


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_wandb_is_reported_before_anything_is_written(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = Path(toy.config("wandb"))
    path.write_text(path.read_text() + "\nvis_backends = [dict(type='diffengine.engine.backends.WandbBackend')]\n")
    assert train(str(path), tmp_path) == 2
    error = capsys.readouterr().err
    assert "wandb is not installed: pip install 'diffengine[wandb]'" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_tensorboard_writes_no_file_without_data(tmp_path: Path) -> None:
    backend = TensorboardBackend(str(tmp_path))
    backend.add_config(Config({"a": 1}))
    backend.close()
    assert not list(tmp_path.iterdir())
    assert backend.experiment is None


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_logs_the_step(tmp_path: Path) -> None:
    """mmengine's own WandbVisBackend drops it."""
    backend = WandbBackend("diffengine-test", options={"mode": "offline"}, save_dir=str(tmp_path))
    backend.add_config(Config({"a": 1}))
    backend.add_image("preview", np.zeros((4, 4, 3), dtype=np.uint8), step=0)
    backend.add_scalars({"loss": 2.0, "lr": 0.1}, step=10)
    backend.add_scalar("loss", 1.0, step=20)
    assert backend.experiment.step == 20
    backend.close()
    assert json.loads(json.dumps(backend.experiment.config.as_dict())) == {"a": 1}
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
