"""What every test needs before anything is imported, and what is built once for all."""

import os
from typing import TYPE_CHECKING

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # two processes, two cores; its threads do not survive a fork
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if TYPE_CHECKING:
    from tests.engine.runs import Toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> "Toy":
    """A toy model, and ten photos of 40 px."""
    from tests.engine.runs import Toy
    from tests.support import models, photos

    root = tmp_path_factory.mktemp("toy")
    models.make_model_folder(root / "model", "toy")
    photos.write_photo_folder(root / "data", 10, 40)
    return Toy(root / "model", root / "data", root)
