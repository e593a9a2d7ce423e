"""Arrow, Parquet and the hub's cache."""

import io
import json
import os
import pickle

import datasets as hf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets.arrow_writer import ArrowWriter
from PIL import Image

from diffengine.datasets import (
    Crop,
    ImageTextDataset,
    PositionSampler,
    Resize,
    Stream,
    ToTensor,
    UnreadableImage,
    make_loader,
)
from diffengine.errors import UserError
from tests.support.photos import all_captions

REVISION = "0123456789" * 4


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A temporary cache, so that the tests do not touch the user's."""
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hf.disable_progress_bars()
    return tmp_path / "cache"


def png(shade, size=(3, 2)):
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def rows(count=4, image="image", **columns):
    """A table with a column of images and one of texts, as on the hub."""
    columns = columns or {"text": [f"caption {number}" for number in range(count)]}
    images = {image: [{"bytes": png(number), "path": f"{number}.png"} for number in range(count)]}
    return hf.Dataset.from_dict(images | columns).cast_column(image, hf.Image())


def shades(samples):
    return [sample["image"].getpixel((0, 0))[0] for sample in samples]


def assert_error(match, *arguments, **options):
    with pytest.raises(UserError, match=match) as caught:
        ImageTextDataset(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(cache):
    """The cache entry that `load_dataset` writes for a hub data set."""
    folder = cache / "owner___name" / "default" / "0.0.0" / REVISION
    folder.mkdir(parents=True)
    table = rows(5)
    writer = ArrowWriter(path=str(folder / "name-train.arrow"), features=table.features)
    for row in table.cast_column("image", hf.Image(decode=False)):
        writer.write(row)
    count, num_bytes = writer.finalize()
    writer.close()
    split = {"name": "train", "num_bytes": num_bytes, "num_examples": count, "dataset_name": "name"}
    info = {"builder_name": "name", "dataset_name": "name", "config_name": "default", "version": "0.0.0"}
    hf.DatasetInfo(features=table.features, splits=[split], **info).write_to_directory(str(folder))
    return "owner/name"


def test_hub_data_set_is_read_from_the_cache_offline(hub):
    dataset = ImageTextDataset(hub, prefix="a ", revision=REVISION)
    samples = [dataset[index] for index in range(5)]
    assert shades(samples) == [0, 1, 2, 3, 4]
    assert [sample["text"] for sample in samples] == [f"a caption {number}" for number in range(5)]
    assert len(ImageTextDataset(hub, split="train[:3]")) == 3
    assert len(ImageTextDataset(hub, max_samples=2)) == 2
    assert len(ImageTextDataset(hub, max_samples=99)) == 5


def test_wrong_hub_names(hub):
    assert_error("there is no folder owner/other, and as a hub data set it cannot be loaded: .*network", "owner/other")
    assert_error("owner/name, .*Unknown split .test.", hub, split="test")
    # `datasets` alone would read the cached revision without a warning
    assert_error(f"revision {'f' * 40} of owner/name is not in the cache, which has {REVISION}", hub, revision="f" * 40)


def test_workers_read_the_same_table(hub):
    stream = Stream(ImageTextDataset(hub), [Resize(4), Crop(4), ToTensor()], [], seed=2)
    single, parallel = (list(make_loader(stream, PositionSampler(4, num_steps=5), workers)) for workers in (0, 2))
    assert [batch["text"] for batch in single] == [batch["text"] for batch in parallel]
    assert all(torch.equal(one["image"], other["image"]) for one, other in zip(single, parallel, strict=True))
    copied = pickle.loads(pickle.dumps(stream))  # spawned workers receive a pickle
    assert torch.equal(copied[3]["image"], stream[3]["image"])


@pytest.mark.parametrize("path", ["", "./gone", "/gone", "~/gone-for-good", "data/my/images"])
def test_missing_path_is_not_looked_up_on_the_hub(path):
    assert_error("no file or folder .*expected one that exists, or a hub name as owner/name", path)


def test_batches_equal_single_rows(hub):
    dataset = ImageTextDataset(hub)
    batch = list(dataset.__getitems__([3, 0, 3]))
    assert shades(batch) == [3, 0, 3]
    assert [sample["text"] for sample in batch] == ["caption 3", "caption 0", "caption 3"]


def test_data_saved_to_disk(tmp_path):
    table = rows()
    table.with_format("arrow").save_to_disk(tmp_path / "one")  # the saved format must not affect the samples
    hf.DatasetDict(train=table, test=rows(2)).save_to_disk(tmp_path / "many")
    one = ImageTextDataset(str(tmp_path / "one"))
    assert (shades([one[2]]), one[2]["text"]) == ([2], "caption 2")
    assert len(ImageTextDataset(str(tmp_path / "many"), split="test")) == 2
    assert_error(
        "has no split 'val'; it has train, test; set --cfg-options split=NAME", str(tmp_path / "many"), split="val"
    )
    assert_error("has no split 'test'; it has train", str(tmp_path / "one"), split="test")
    assert_error("revision got 'v1'", str(tmp_path / "one"), revision="v1")


def test_no_progress_bar_stands_next_to_our_lines(tmp_path, capfd):
    hf.enable_progress_bars()
    rows(2).to_parquet(tmp_path / "train.parquet")
    capfd.readouterr()
    assert len(ImageTextDataset(str(tmp_path / "train.parquet"))) == 2
    assert capfd.readouterr().err == ""


def test_an_error_of_datasets_is_one_line_with_its_cause(tmp_path, capfd, monkeypatch):
    """`datasets` logs an error that it raises, and raises one that names no reason."""
    pq.write_table(pa.table({}), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="cannot be loaded: BatchSize must be greater than 0, got 0; check the files"):
        ImageTextDataset(str(tmp_path / "empty.parquet"))
    assert capfd.readouterr().err == ""


def test_parquet_file_and_folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows(4).select([0, 1]).to_parquet(folder / "train-00000-of-00002.parquet")
    rows(4).select([2, 3]).to_parquet(folder / "train-00001-of-00002.parquet")
    rows(1).to_parquet(folder / "test-00000-of-00001.parquet")
    whole = ImageTextDataset(str(folder))
    assert shades(whole[index] for index in range(4)) == [0, 1, 2, 3]
    assert len(ImageTextDataset(str(folder), split="test")) == 1
    assert all_captions(ImageTextDataset(str(folder / "train-00001-of-00002.parquet"))) == [
        "caption 2",
        "caption 3",
    ]
    (tmp_path / "broken.parquet").write_bytes(b"junk")
    assert_error("broken.parquet cannot be loaded: Parquet file size is 4 bytes", str(tmp_path / "broken.parquet"))
    (tmp_path / "notes.txt").write_text("x")
    assert_error("notes.txt is neither an image nor a Parquet file", str(tmp_path / "notes.txt"))


def test_column_of_bytes_is_read_as_images(tmp_path):
    hf.Dataset.from_dict({"image": [png(7)], "text": ["x"]}).save_to_disk(tmp_path / "bytes")
    assert shades([ImageTextDataset(str(tmp_path / "bytes"))[0]]) == [7]


def test_columns_are_detected_or_chosen(tmp_path):
    path = str(tmp_path / "it")
    rows(2, "photo", prompt=["p0", "p1"], caption=["c0", "c1"], label=[0, 1]).save_to_disk(path)
    dataset = ImageTextDataset(path)
    assert (shades([dataset[1]]), dataset[1]["text"]) == ([1], "c1")
    assert ImageTextDataset(path, caption_column="prompt")[0]["text"] == "p0"
    everything = "photo, prompt, caption, label"
    assert_error(
        f"has no column 'image'; it has {everything}; set --cfg-options image_column=NAME", path, image_column="image"
    )
    assert_error(
        f"has no column 'txt'; it has {everything}; set --cfg-options caption_column=NAME", path, caption_column="txt"
    )
    assert_error(
        "column 'label' of .* expected text, or lists of texts; it has .*; set --cfg-options caption_column=NAME",
        path,
        caption_column="label",
    )
    assert_error(
        "column 'prompt' of .* expected images; it has .*; set --cfg-options image_column=NAME",
        path,
        image_column="prompt",
    )
    assert_error("captions_from_file_names needs a folder of images", path, captions_from_file_names=True)
    assert_error("got caption and caption_column", path, caption="x", caption_column="prompt")


def test_one_caption_for_all_needs_no_column(tmp_path):
    rows(2, label=[0, 1]).save_to_disk(tmp_path / "it")
    dataset = ImageTextDataset(str(tmp_path / "it"), caption="x", prefix="an ")
    assert [dataset[1]["text"], *all_captions(dataset)] == ["an x", "an x", "an x"]


def test_column_named_text_does_not_clash_with_the_caption_column(tmp_path):
    rows(1, text=["long"], title=["short"]).save_to_disk(tmp_path / "it")
    assert ImageTextDataset(str(tmp_path / "it"), caption_column="title")[0]["text"] == "short"


def test_lists_of_captions(tmp_path):
    rows(2, text=[["a", "b"], ["c"]]).save_to_disk(tmp_path / "it")
    dataset = ImageTextDataset(str(tmp_path / "it"), prefix="the ")
    assert dataset[0]["text"] == ["the a", "the b"]
    assert all_captions(dataset) == ["the a", "the b", "the c"]


@pytest.mark.parametrize("texts", [["a", None, None], [["a"], [], ["b", None]]])
def test_missing_captions_are_counted(tmp_path, texts):
    rows(3, text=texts).save_to_disk(tmp_path / "it")
    assert_error("2 of 3 captions of .* are missing, the first in row 1", str(tmp_path / "it"))


def test_error_of_a_damaged_or_missing_image_names_its_row(tmp_path):
    cells = [{"bytes": png(0), "path": None}, {"bytes": png(0)[:44], "path": "x.png"}, None]
    table = hf.Dataset.from_dict({"image": cells, "text": ["a", "b", "c"]}).cast_column("image", hf.Image())
    table.save_to_disk(tmp_path / "it")
    dataset = ImageTextDataset(str(tmp_path / "it"))
    with pytest.raises(UnreadableImage, match=r"^row 1 of .*it \(x.png\) cannot be read as an image"):
        dataset[1]
    with pytest.raises(UnreadableImage, match=r"^row 2 of .*it has no image"):
        dataset.size(2)
    samples = dataset.__getitems__([0, 1])
    assert next(iter(samples))["text"] == "a"  # decoded lazily: the readable image comes before the error


def test_size_and_captions_decode_no_image(tmp_path):
    header = png(0, (50, 40))
    header = header[: header.index(b"IDAT") + 4]
    hf.Dataset.from_dict({"image": [header], "text": ["x"]}).save_to_disk(tmp_path / "it")
    dataset = ImageTextDataset(str(tmp_path / "it"))
    assert dataset.size(0) == (50, 40)
    assert all_captions(dataset) == ["x"]


def test_no_rows(tmp_path):
    table = hf.Dataset.from_dict({"image": [png(0)], "text": ["x"]})
    table.select([]).save_to_disk(tmp_path / "it")
    assert_error("it cannot be loaded", str(tmp_path / "it"))
    table.to_parquet(tmp_path / "it.parquet")
    assert_error(
        "it.parquet cannot be loaded: .*corresponds to no data",
        str(tmp_path / "it.parquet"),
        split="train[:0]",
    )


def test_table_with_paths_of_images(tmp_path):
    Image.fromarray(np.full((2, 2, 3), 8, np.uint8)).save(tmp_path / "a.png")
    table = hf.Dataset.from_dict({"image": [str(tmp_path / "a.png")], "text": ["x"]})
    table.cast_column("image", hf.Image()).save_to_disk(tmp_path / "it")
    assert shades([ImageTextDataset(str(tmp_path / "it"))[0]]) == [8]


def test_tables_that_name_files_outside_of_their_folder(tmp_path):
    (tmp_path / "data").mkdir()
    for path, name in ((tmp_path / "data" / "a.png", "inside"), (tmp_path / "b.png", "outside")):
        path.write_bytes(png(8))
        table = pa.table({"image": [{"bytes": None, "path": str(path)}], "text": ["x"]})
        pq.write_table(table, tmp_path / "data" / f"{name}.parquet")
    assert shades([ImageTextDataset(str(tmp_path / "data" / "inside.parquet"))[0]]) == [8]
    outside = str(tmp_path / "data" / "outside.parquet")
    assert_error("names the image '.*b.png' outside of its folder", outside)
    assert shades([ImageTextDataset(outside, allow_outside=True)[0]]) == [8]


@pytest.mark.parametrize(
    "cells",
    [[{"bytes": 5, "path": "x"}], [{"bytes": "x", "path": "x"}], [{"bytes": b"x", "path": 5}], [{"bytes": [b"x"]}]],
    ids=str,
)
def test_columns_of_other_types_than_images(tmp_path, cells):
    pq.write_table(pa.table({"image": cells, "text": ["x"]}), tmp_path / "it.parquet")
    assert_error("column 'image' of .* holds .*; expected images", str(tmp_path / "it.parquet"))


SAVED = {
    "dataset_dict.json": ({"splits": 5}, {"splits": ["../it"]}, {"splits": [None]}, {}, []),
    "state.json": ({"_data_files": [{"filename": "../secret.arrow"}]}, {"_data_files": [{"filename": "/etc/passwd"}]},
                   {"_data_files": [5]}, {"_data_files": 5}, {}, []),
    "dataset_info.json": ([], {"features": {"image": {"_type": "os.system"}}}, {"features": 5}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"), [(name, text) for name, texts in SAVED.items() for text in texts], ids=str
)
def test_damaged_or_foreign_data_saved_to_disk(tmp_path, name, content):
    hf.Dataset.from_dict({"image": [b"x"], "text": ["x"]}).save_to_disk(tmp_path / "it")
    (tmp_path / "it" / name).write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        ImageTextDataset(str(tmp_path / "it"))
    assert "\n" not in str(caught.value)


def test_offsets_that_lead_out_of_a_table(tmp_path):
    """Reading such a cell ends the process."""
    hf.Dataset.from_dict({"image": [b"x", b"y"], "text": ["x", "y"]}).save_to_disk(tmp_path / "it")
    file = next((tmp_path / "it").glob("*.arrow"))
    offsets = np.array([0, 1, 2], np.int32).tobytes()
    content = file.read_bytes()
    assert content.count(offsets) == 2  # of images and of texts
    file.write_bytes(content.replace(offsets, np.array([0, 2**30, 2**30 + 1], np.int32).tobytes()))
    assert_error("is damaged: ", str(tmp_path / "it"))


def test_fifos_are_not_read_as_tables(tmp_path):
    os.mkfifo(tmp_path / "a.parquet")
    os.mkfifo(tmp_path / "state.json")
    for path in (tmp_path / "a.parquet", tmp_path):
        assert_error("it is no regular file", str(path))
