"""The cache is built again if something that its tokens depend on has changed, and only then."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from diffengine.cache.tables import Table, TableBuilder, delete_table
from tests.cache.caches import (
    BUILD,
    CHECK,
    VARIATIONS,
    WeightedImages,
    count_encoded,
    image_files,
    weighted_images,
)
from tests.engine.runs import WITH_TEXT_ENCODER


def change_image(toy_copy):
    Image.new("RGB", (40, 40), "red").save(image_files(toy_copy)[4])


def touch_image(toy_copy):
    os.utime(image_files(toy_copy)[4], ns=(1, 1))


def change_caption(toy_copy):
    (file,) = toy_copy.data.glob("metadata.*")
    file.write_text(file.read_text().replace("a ", "the ", 1))


def change_tokenizer(toy_copy):
    file = toy_copy.model / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 60}))


def change_weight(component, key):
    """A function that changes the first weight of a component whose name contains `key`."""

    def change(toy_copy):
        from safetensors.torch import load_file, save_file

        (file,) = (toy_copy.model / component).glob("*.safetensors")
        weights = load_file(file)
        name = next(name for name in sorted(weights) if key in name)
        save_file({**weights, name: weights[name] + 1e-3}, file, {"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("change", "settings", "images", "captions"),
    [
        (None, {}, CHECK, 0),
        (None, {"learning_rate": 1e-2, "caption_dropout": 0.0, "batch_size": 2, "max_iters": 90}, CHECK, 0),
        (touch_image, {}, CHECK, 0),  # the file is read again, and its bytes are the same
        (change_image, {}, BUILD, 0),
        (change_caption, {}, BUILD, 11),
        (None, {"resolution": 24}, BUILD, 0),
        (None, {"flip": 0.25}, BUILD, 0),
        (None, {"image_variations": 2}, 1 + 10 * 2, 0),
        (None, {"seed": 1}, BUILD, 0),
        (change_weight("vqvae", "encoder.conv_in"), {}, BUILD, 0),
        (change_weight("vqvae", "quantize"), {}, BUILD, 0),
        (change_weight("vqvae", "decoder.conv_in"), {}, CHECK, 0),  # the decoder is not used for encoding
        (change_weight("text_encoder", "layers.0.mlp.fc1.weight"), {}, CHECK, 11),
        (change_weight("transformer", "conv"), {}, CHECK, 0),
        (change_tokenizer, {}, CHECK, 11),
        (None, {"precision": "bf16"}, CHECK, 11),
        (None, {"train": "text"}, CHECK, 11),  # ids instead of embeddings
    ],
)  # fmt: skip
def test_what_rebuilds_the_cache(toy_copy, encoded, change, settings, images, captions):
    assert count_encoded(toy_copy, encoded) == (BUILD, 11)
    if change:
        change(toy_copy)
    options = [WITH_TEXT_ENCODER] if settings.pop("train", None) else []
    assert count_encoded(toy_copy, encoded, *options, **settings) == (images, captions)
    assert count_encoded(toy_copy, encoded, *options, **settings) == (CHECK, 0)


def test_wrong_tokens_in_the_table_are_detected(toy_copy, encoded, capsys):
    """The code of a transform may change while the config does not, so every start encodes eight images again."""
    count_encoded(toy_copy, encoded)
    table = Table(toy_copy.root / "kept" / "pictures.arrow")
    rows = [table[row] for row in range(10 * VARIATIONS)]
    rows[-1]["token_ids"] = 63 - rows[-1]["token_ids"]
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "text"}
    delete_table(table.file)
    builder = TableBuilder(table.file, table.fingerprint, len(rows))
    builder.begin()
    builder.write((0, len(rows)), {**arrays, "text": [row["text"] for row in rows]})
    builder.finish()
    assert count_encoded(toy_copy, encoded) == (CHECK + BUILD, 0)
    assert "tokens have changed; encoding 10 images in 3 variations each" in capsys.readouterr().out


def test_a_caption_that_moves_to_the_next_image_is_detected(toy_copy, encoded):
    """The flat list of captions stays the same, and neither image is one that a start encodes again."""
    names = [file.name for file in image_files(toy_copy)]
    captions = [[f"{index} a", f"{index} b"] for index in range(10)]
    (toy_copy.data / "metadata.csv").unlink()

    def write_captions():
        rows = [json.dumps({"file_name": name, "text": texts}) for name, texts in zip(names, captions)]
        (toy_copy.data / "metadata.jsonl").write_text("\n".join(rows))

    write_captions()
    count_encoded(toy_copy, encoded, image_variations=1)
    checked = np.unique(np.linspace(0, 9, CHECK).round().astype(int)).tolist()
    index = next(index for index in range(9) if index not in checked)
    captions[index + 1].insert(0, captions[index].pop())
    write_captions()
    assert count_encoded(toy_copy, encoded, image_variations=1) == (1 + 10, 0)
    table = Table(toy_copy.root / "kept" / "pictures.arrow")
    assert [row["text"] for row in map(table.__getitem__, range(10))] == captions


def test_a_changed_sample_weight_rebuilds_the_table(toy_copy, encoded, capsys, monkeypatch):
    option = weighted_images(toy_copy, 1)
    count_encoded(toy_copy, encoded, option)
    assert count_encoded(toy_copy, encoded, option) == (CHECK, 0)
    monkeypatch.setattr(WeightedImages, "weight", 0.5)
    assert count_encoded(toy_copy, encoded, option) == (CHECK + BUILD, 0)
    assert "has changed" in capsys.readouterr().out
    table = Table(toy_copy.root / "kept" / "pictures.arrow")
    assert [table[VARIATIONS * index]["weight"].item() for index in (3, 9)] == [0.5, 0.5]
