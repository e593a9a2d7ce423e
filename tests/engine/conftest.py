"""Built once for all tests of the engine."""

from pathlib import Path

import pytest

from tests.engine.runs import Toy, train

LAST = 12  # steps of the reference run


REFERENCE = {"max_iters": LAST, "checkpoint_every": 4, "keep_checkpoints": 2, "log_every": 5,
             "lr_schedule": "cosine", "warmup_iters": 3, "learning_rate": 1e-3}  # fmt: skip


@pytest.fixture(scope="session")
def reference(toy: Toy) -> Path:
    """The work dir of a run of 12 steps that nothing disturbed."""
    work_dir = toy.root / "reference"
    assert train(toy.config("reference", **REFERENCE), work_dir) == 0
    return work_dir
