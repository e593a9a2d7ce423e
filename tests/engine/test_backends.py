"""TensorBoard and Weights & Biases."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffengine.engine.backends import TensorboardBackend, WandbBackend, grouped
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


def test_tensorboard_shows_the_config_and_groups(tmp_path: Path) -> None:
    backend = TensorboardBackend(str(tmp_path))
    backend.add_config(Config({"a": 1}))
    backend.add_scalars({"loss": 2.0}, step=3)
    backend.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    (text,) = events.Tensors("config/text_summary")
    assert (text.step, text.tensor_proto.string_val[0].decode()) == (3, "```python\na = 1\n```")


def test_groups_of_scalars() -> None:
    names = {
        "train": ["loss", "accuracy", "lr", "captions_dropped", "perplexity", "skipped_pictures"],
        "loss_by_t": ["loss_t0", "loss_t7"],
        "gradients": ["grad_norm", "grad_norm_down_up"],
        "speed": ["images_per_second", "tokens_per_second", "seconds_per_step", "data_wait"],
        "memory": ["memory_gb"],
    }
    assert list(grouped({name: 0 for group in names.values() for name in group})) == [
        f"{group}/{name}" for group in names for name in names[group]
    ]
    assert grouped({"val/loss": 1.0, "val/loss_t0": 2.0}) == {"val/loss": 1.0, "val/loss_t0": 2.0}


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
