"""A toy model and images that a test may change, and a count of what is encoded."""

import shutil

import pytest

from diffengine.models.amused.encoder import AmusedEncoder
from tests.engine import runs


@pytest.fixture
def toy_copy(toy, tmp_path):
    """A copy of the toy model and images, which the test may change."""
    for name in ("model", "data"):
        shutil.copytree(getattr(toy, name), tmp_path / name)
    return runs.Toy(tmp_path / "model", tmp_path / "data", tmp_path)


@pytest.fixture
def encoded(monkeypatch):
    """How many images and captions have been encoded."""
    counts = {"images": 0, "captions": 0}
    encode_images, encode_captions = AmusedEncoder.encode_images, AmusedEncoder.encode_captions

    def count_images(self, images):
        counts["images"] += len(images)
        return encode_images(self, images)

    def count_captions(self, texts, embeddings):
        counts["captions"] += len(texts)
        return encode_captions(self, texts, embeddings)

    monkeypatch.setattr(AmusedEncoder, "encode_images", count_images)
    monkeypatch.setattr(AmusedEncoder, "encode_captions", count_captions)
    return counts
