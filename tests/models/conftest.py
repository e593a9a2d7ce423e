"""A small model that the tests share. They read its folder, and never write to it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffengine.models.amused import AmusedModel
from tests.support import models

CAPTIONS = ["a cat", "", "yoda pokemon"]


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """f = 4, 32 px, 8x8 tokens, 64 codes, mask id 79, 64 text tokens; with down and up blocks."""
    return models.make_model_folder(tmp_path_factory.mktemp("model") / "toy", "toy")


@pytest.fixture(scope="session")
def model(toy: Path) -> AmusedModel:
    """Shared: do not modify it."""
    return AmusedModel(str(toy)).train()


@pytest.fixture
def batch() -> dict[str, Any]:
    """Three samples, as collate returns them."""
    return make_batch()


def make_batch(size: int = 32, factor: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    tokens = (size // factor) ** 2
    masked = [rng.permutation(tokens)[:n] for n in (1, 20, tokens)]
    conditions = [[640.0, 480, 3, 5, 6], [32, 32, 0, 0, 6], [100, 50, 7, 0, 6]]
    return {
        "image": torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)),
        "micro_conds": torch.tensor(conditions),
        "text": CAPTIONS,
        "masked": masked,
        "num_targets": [len(row) for row in masked],
    }
