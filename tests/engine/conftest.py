"""The reference run that several tests of the engine compare with."""

from pathlib import Path

import pytest

from tests.engine.runs import Toy, train

LAST = 12  # the last step of the reference run
REFERENCE = {"max_iters": LAST, "checkpoint_every": 4, "keep_checkpoints": 2, "log_every": 5,
             "lr_schedule": "cosine", "warmup_iters": 3, "learning_rate": 1e-3}  # fmt: skip


@pytest.fixture(scope="session")
def reference(toy: Toy) -> Path:
    """The work dir of an uninterrupted run of 12 steps."""
    work_dir = toy.root / "reference"
    assert train(toy.config("reference", **REFERENCE), work_dir) == 0
    return work_dir
