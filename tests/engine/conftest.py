"""Built once for all tests of the engine."""

from pathlib import Path

import pytest

from tests.engine.runs import Toy, train
from tests.support import models, photos

LAST = 12  # steps of the reference run


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    root = tmp_path_factory.mktemp("toy")
    models.make_model_folder(root / "model", "toy")
    photos.write_photo_folder(root / "data", 10, 40)
    return Toy(root / "model", root / "data", root)


REFERENCE = {"max_iters": LAST, "checkpoint_every": 4, "keep_checkpoints": 2, "log_every": 5,
             "lr_schedule": "cosine", "warmup_iters": 3, "learning_rate": 1e-3}  # fmt: skip


@pytest.fixture(scope="session")
def reference(toy: Toy) -> Path:
    """The work dir of a run of 12 steps that nothing disturbed."""
    work_dir = toy.root / "reference"
    assert train(toy.config("reference", **REFERENCE), work_dir) == 0
    return work_dir
