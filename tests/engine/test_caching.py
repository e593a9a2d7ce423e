"""The token cache: equal to encoding at each step, built anew when something changed and only then."""

import json
import os
import random
import shutil
import signal
import time

import datasets as hf
import numpy as np
import pytest
import torch
from PIL import Image

from diffengine import cli
from diffengine.cache import TokenCache, token_cache
from diffengine.cache import tables as cache_tables
from diffengine.cache.tables import Table, TableBuilder
from diffengine.datasets import ImageTextDataset
from diffengine.errors import UserError
from diffengine.models.amused.encoder import AmusedEncoder
from tests.engine import runs
from tests.engine.runs import assert_equal_checkpoints, build, first_step, in_child, metrics, on_ranks, train

V = 3  # variations of each image
CACHED = {"image_variations": V, "batch_size": 4, "max_iters": 30, "caption_dropout": 0.3}


def pieces(toy, work_dir, *options, **settings):
    """A run's parts as training has them."""
    return build(toy.config("cached", **{**CACHED, **settings}), work_dir, *options)


def tables(work_dir):
    (folder,) = (work_dir.parent / "cache").iterdir()
    return Table(folder / "pictures.arrow"), Table(folder / "captions.arrow")


def test_samples_from_the_cache_are_those_encoded_at_each_step(toy, tmp_path):
    online = pieces(toy, tmp_path / "online", cache=False, flip=0.5).train_loop.stream
    runner = pieces(toy, tmp_path / "cached", cache=True)
    cached, encoder = runner.train_loop.stream, runner.trainable.encoder
    assert cached.cached_sample is not None
    assert online.cached_sample is None
    ids = set()
    for position in range(0, 10 * (V + 1), 4):  # past the epoch in which variations begin again
        positions = range(position, position + 4)
        plain = online.__getitems__(positions)
        (kept,) = [cached.__getitems__(positions)]
        fresh = encoder.encode_images(torch.stack([sample["image"] for sample in plain]))["token_ids"]
        for row, (one, other) in enumerate(zip(plain, kept)):
            assert torch.equal(other["token_ids"], fresh[row])
            assert other["token_ids"].dtype == torch.uint8  # 64 codes
            assert torch.equal(one["micro_conds"], other["micro_conds"])
            assert one["masked"].tolist() == other["masked"].tolist()
            assert (one["text"], one["num_targets"]) == (other["text"], other["num_targets"])
            assert "image" not in other
            ids.add(other["token_ids"].numpy().tobytes())
    assert len(ids) > 15  # 10 images, most in several variations


@pytest.mark.parametrize("train_text", [True, False])
def test_loss_and_gradients_from_the_cache(toy, tmp_path, train_text):
    options = [runs.TEXT_TOO] if train_text else []
    path = toy.config("step", **{**CACHED, "max_iters": 1})
    online = first_step(path, tmp_path / "online", *options, "cache=False")
    cached = first_step(path, tmp_path / "cached", *options, "cache=True")
    assert cached.masked == online.masked
    assert cached.targets == online.targets
    names = set(tables(tmp_path / "cached")[1][0]) - {"text"}
    if train_text:  # caption ids only: bit for bit
        assert names == {"text_ids"}
        assert cached.loss_sum == online.loss_sum
        assert all(torch.equal(one, other) for one, other in zip(cached.grads, online.grads))
    else:  # the text encoder ran on other companies of captions: to rounding
        assert names == {"hidden_states", "pooled_text_emb"}
        assert cached.loss_sum == pytest.approx(online.loss_sum, rel=1e-6)
        for one, other in zip(cached.grads, online.grads):
            assert (one - other).norm() <= 1e-5 * other.norm().clamp_min(1e-6)


def test_a_cached_run_that_is_killed_and_resumed_equals_one_that_was_not(toy, tmp_path):
    path = toy.config("whole", **{**CACHED, "max_iters": 6, "checkpoint_every": 2})
    assert train(path, tmp_path / "whole", "--cfg-options", "cache=True") == 0
    options = ["--cfg-options", "cache=True", runs.signal_at(3, signal.SIGKILL)]
    assert in_child(train, path, tmp_path / "killed", *options) == -signal.SIGKILL
    assert train(path, tmp_path / "killed", "--resume", "--cfg-options", "cache=True") == 0
    assert_equal_checkpoints(tmp_path / "whole" / "iter_6.pth", tmp_path / "killed" / "iter_6.pth")
    # and the whole run with encoding at each step, from trained text on, is the same run
    text = toy.config("text", **{**CACHED, "max_iters": 3})
    for name, use in (("on", True), ("off", False)):
        assert train(text, tmp_path / name, "--cfg-options", f"cache={use}", runs.TEXT_TOO) == 0
    assert_equal_checkpoints(tmp_path / "on" / "iter_3.pth", tmp_path / "off" / "iter_3.pth")


def test_the_table_opens_as_a_data_set_and_holds_the_smallest_types(toy, tmp_path):
    pieces(toy, tmp_path / "run", cache=True)
    images, captions = tables(tmp_path / "run")
    rows = hf.Dataset.from_file(str(images.file))
    assert len(rows) == len(images) == 10 * V
    assert rows.features["token_ids"].feature.dtype == "uint8"
    assert np.array_equal(np.array(rows[7]["token_ids"]).reshape(8, 8), images[7]["token_ids"])
    texts = hf.Dataset.from_file(str(captions.file))["text"]
    assert [""] in list(texts)
    assert len(texts) == len({text for (text,) in texts})


# -------------------------------------------------------------------------------------------------- "auto"


FIXED = {"image_variations": None, "flip": 0.0, "random_crop": False}  # nothing varies: one variation


@pytest.mark.parametrize(
    ("settings", "on"),
    [
        ({"max_iters": 8}, True),  # 32 samples of 10 images in 3 variations
        ({"max_iters": 7}, False),
        ({"max_iters": 8, "image_variations": None}, False),
        (
            {"max_iters": 3, "image_variations": None, "flip": 0.0, "random_crop": False},
            True,
        ),  # nothing varies
        ({"max_iters": 2, "image_variations": None, "flip": 0.0, "random_crop": False}, False),
    ],
)
def test_auto_is_on_where_a_variation_is_taken_more_than_once(toy, tmp_path, capsys, settings, on):
    runner = pieces(toy, tmp_path / "run", **settings)
    assert (runner.train_loop.stream.cached_sample is not None) == on
    assert ("token cache: 10 images in" in capsys.readouterr().out) == on
    assert (tmp_path / "cache").exists() == on


def test_what_cannot_be_cached_says_so_when_asked(toy, tmp_path):
    with pytest.raises(UserError, match=r"crop and flip are drawn again .* set image_variations"):
        pieces(toy, tmp_path / "run", cache=True, image_variations=None)
    with pytest.raises(UserError, match="text_embeddings=True, but the text encoder is trained"):
        pieces(toy, tmp_path / "run", "token_cache.text_embeddings=True", runs.TEXT_TOO, cache=True)
    with pytest.raises(UserError, match="this model learns from pixels"):
        build(toy.vq_config("vq", 1, 1), tmp_path / "run", "token_cache={'use': True}")


class Named:
    """A data set whose samples say more than a table keeps."""

    def __init__(self, path: str) -> None:
        self.inner = ImageTextDataset(path)

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return {**self.inner[index], "name": f"image {index}"}


def test_samples_that_no_table_keeps_are_encoded_at_each_step(toy, tmp_path):
    data = f"train_dataloader.dataset={{'type': 'tests.engine.test_caching.Named', 'path': {str(toy.data)!r}}}"
    assert pieces(toy, tmp_path / "auto", data).train_loop.stream.cached_sample is None
    with pytest.raises(UserError, match=r"it stores tensors and numbers, but .* name of type str"):
        pieces(toy, tmp_path / "asked", data, cache=True)


def test_a_full_disk_is_told_before_the_build(toy, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(token_cache.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"the cache needs .* free; free space, set cache_path"):
        pieces(toy, tmp_path / "run", cache=True)


# -------------------------------------------------------------------------------------------- fingerprints


@pytest.fixture
def own(toy, tmp_path):
    """A toy whose images and model may be changed."""
    for name in ("model", "data"):
        shutil.copytree(getattr(toy, name), tmp_path / name)
    return runs.Toy(tmp_path / "model", tmp_path / "data", tmp_path)


@pytest.fixture
def encoded(monkeypatch):
    """How many images and captions were encoded, by what."""
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


def start(own, encoded, *options, **settings):
    """(images, captions) encoded by a start of the run."""
    encoded.update(images=0, captions=0)
    shutil.rmtree(own.root / "run", ignore_errors=True)
    pieces(own, own.root / "run", *options, **{"cache": True, "cache_path": str(own.root / "kept"), **settings})
    return encoded["images"], encoded["captions"]


CHECK = 8
BUILD = 1 + 10 * V  # one to know a row's size


def an_image(own):
    return sorted(own.data.glob("*.*g"))[4]


def other_bytes(own):
    Image.new("RGB", (40, 40), "red").save(an_image(own))


def other_weights(component, part):
    def change(own):
        from safetensors.torch import load_file, save_file

        (file,) = (own.model / component).glob("*.safetensors")
        weights = load_file(file)
        name = next(name for name in sorted(weights) if part in name)
        save_file({**weights, name: weights[name] + 1e-3}, file, {"format": "pt"})

    return change


def other_caption(own):
    (file,) = own.data.glob("metadata.*")
    file.write_text(file.read_text().replace("a ", "the ", 1))


def touched(own):
    os.utime(an_image(own), ns=(1, 1))


def other_tokenizer(own):
    file = own.model / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 60}))


@pytest.mark.parametrize(
    ("change", "settings", "images", "captions"),
    [
        (None, {}, CHECK, 0),
        (None, {"learning_rate": 1e-2, "caption_dropout": 0.0, "batch_size": 2, "max_iters": 90}, CHECK, 0),
        (touched, {}, CHECK, 0),  # its bytes are read again, and are the same
        (other_bytes, {}, BUILD, 0),
        (other_caption, {}, BUILD, 11),
        (None, {"resolution": 24}, BUILD, 0),
        (None, {"flip": 0.25}, BUILD, 0),
        (None, {"image_variations": 2}, 1 + 10 * 2, 0),
        (None, {"seed": 1}, BUILD, 0),
        (other_weights("vqvae", "encoder.conv_in"), {}, BUILD, 0),
        (other_weights("vqvae", "quantize"), {}, BUILD, 0),
        (other_weights("vqvae", "decoder.conv_in"), {}, CHECK, 0),  # makes no ids
        (other_weights("text_encoder", "layers.0.mlp.fc1.weight"), {}, CHECK, 11),
        (other_weights("transformer", "conv"), {}, CHECK, 0),
        (other_tokenizer, {}, CHECK, 11),
        (None, {"precision": "bf16"}, CHECK, 11),
        (None, {"train": "text"}, CHECK, 11),  # ids in place of embeddings
    ],
)  # fmt: skip
def test_what_changes_the_tokens_and_only_that_builds_them_anew(own, encoded, change, settings, images, captions):
    assert start(own, encoded) == (BUILD, 11)
    if change:
        change(own)
    text = [runs.TEXT_TOO] if settings.pop("train", None) else []
    assert start(own, encoded, *text, **settings) == (images, captions)
    assert start(own, encoded, *text, **settings) == (CHECK, 0)


def test_a_table_that_holds_other_tokens_is_found_out(own, encoded, capsys):
    """A transform's code may change where no config does: eight images are encoded anew at each start."""
    start(own, encoded)
    file = own.root / "kept" / "pictures.arrow"
    rows = Table(file)
    bad = rows[10 * V - 1]["token_ids"]  # a view of the file
    content = file.read_bytes()
    assert bad.tobytes() in content
    file.write_bytes(content.replace(bad.tobytes(), (63 - bad).astype(np.uint8).tobytes()))
    assert start(own, encoded) == (CHECK + BUILD, 0)
    assert "tokens have changed; encoding 10 images in 3 variations each" in capsys.readouterr().out


@pytest.mark.parametrize("table", ["pictures", "captions"])
def test_a_table_that_broke_off_is_built_anew(own, encoded, table):
    """A copy that was stopped leaves the JSON whole."""
    start(own, encoded)
    file = own.root / "kept" / f"{table}.arrow"
    file.write_bytes(file.read_bytes()[:-100])
    assert start(own, encoded) == ((BUILD, 0) if table == "pictures" else (CHECK, 11))
    assert start(own, encoded) == (CHECK, 0)


def test_a_caption_that_moved_to_the_next_image_is_found_out(own, encoded):
    """Of no image that is encoded anew, and the flat list of captions is the same."""
    images = sorted(file.name for file in own.data.glob("*.*g"))
    said = [[f"{k} a", f"{k} b"] for k in range(10)]
    (own.data / "metadata.csv").unlink()

    def write():
        rows = [json.dumps({"file_name": name, "text": texts}) for name, texts in zip(images, said)]
        (own.data / "metadata.jsonl").write_text("\n".join(rows))

    write()
    one = {"image_variations": 1}
    start(own, encoded, **one)
    looked_at = np.unique(np.linspace(0, 9, CHECK).round().astype(int)).tolist()
    k = next(k for k in range(9) if k not in looked_at)
    said[k + 1].insert(0, said[k].pop())
    write()
    assert start(own, encoded, **one) == (1 + 10, 0)
    table = Table(own.root / "kept" / "pictures.arrow")
    assert [row["text"] for row in map(table.__getitem__, range(10))] == said


class Weighted:
    """A weight for every other image: for the even ones, or for the odd ones."""

    weight = 0.25

    def __init__(self, path: str, odd: int) -> None:
        self.inner, self.odd = ImageTextDataset(path), odd

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return {**self.inner[index], **({"weight": self.weight} if index % 2 == self.odd else {})}


def weighted(own, odd):
    kind = {"type": "tests.engine.test_caching.Weighted", "path": str(own.data), "odd": odd}
    return f"train_dataloader.dataset={kind}"


@pytest.mark.parametrize("odd", [0, 1])
def test_a_weight_that_only_some_samples_have_is_kept(own, odd):
    online = pieces(own, own.root / "online", weighted(own, odd), cache=False).train_loop.stream
    cached = pieces(own, own.root / "cached", weighted(own, odd), cache=True).train_loop.stream
    weights = [cached[position].get("weight") for position in range(10)]
    assert weights == [online[position].get("weight") for position in range(10)]
    assert sorted(weights, key=str) == [0.25] * 5 + [None] * 5


def test_another_weight_builds_the_table_anew(own, encoded, capsys, monkeypatch):
    start(own, encoded, weighted(own, 1))
    assert start(own, encoded, weighted(own, 1)) == (CHECK, 0)
    monkeypatch.setattr(Weighted, "weight", 0.5)
    assert start(own, encoded, weighted(own, 1)) == (CHECK + BUILD, 0)
    assert "has changed" in capsys.readouterr().out
    table = Table(own.root / "kept" / "pictures.arrow")
    assert [table[V * index]["weight"].item() for index in (3, 9)] == [0.5, 0.5]


def test_an_unreadable_image_is_replaced_as_without_a_cache(own):
    an_image(own).write_bytes(b"no image")
    skip = {"train_dataloader": {"skip_unreadable": True}}
    online = pieces(own, own.root / "online", cache=False, **skip).train_loop.stream
    cached = pieces(own, own.root / "cached", cache=True, **skip).train_loop.stream
    for position in range(40):
        one, other = online[position], cached[position]
        assert (one["text"], one["skipped"]) == (other["text"], other["skipped"])
        assert torch.equal(one["micro_conds"], other["micro_conds"])
    assert sum(cached[position]["skipped"] for position in range(10)) == 1


# ------------------------------------------------------------------------------------- without the images


def test_a_copied_cache_serves_where_the_images_are_not(own, encoded, capsys):
    kept = {"cache_path": str(own.root / "kept"), "prompts": 2}
    path = own.config("away", **{**CACHED, "max_iters": 9, **kept})
    assert train(path, own.root / "here") == 0
    shutil.copytree(own.root / "kept", own.root / "copy")
    shutil.rmtree(own.data)
    encoded.update(images=0, captions=0)
    assert train(path, own.root / "there", "--cfg-options", f"cache_path={own.root / 'copy'}") == 0
    assert encoded == {"images": 0, "captions": 0}
    assert f"training from the cache '{own.root / 'copy'}' alone" in capsys.readouterr().out
    assert_equal_checkpoints(own.root / "here" / "iter_9.pth", own.root / "there" / "iter_9.pth")
    short = ["--cfg-options", f"cache_path={own.root / 'copy'}", "max_iters=1"]
    assert train(path, own.root / "short", *short) == 0  # though it takes no variation twice
    assert "token cache: 10 images" in capsys.readouterr().out
    assert train(path, own.root / "said", *short, "train_dataloader.dataset.prefix='a '") == 2
    assert "the images to build it again are not here: changed since it was built: data set" in (
        capsys.readouterr().err
    )
    own.data.mkdir()
    assert train(path, own.root / "empty", *short) == 2  # a folder with a problem is not passed over
    assert "training from the cache" not in capsys.readouterr().out
    own.data.rmdir()
    other_weights("vqvae", "encoder.conv_in")(own)
    assert train(path, own.root / "other", "--cfg-options", f"cache_path={own.root / 'copy'}") == 2
    error = capsys.readouterr().err
    assert "does not fit this run, and the images to build it again are not here" in error
    assert "VQ model" in error
    assert error.count("\n") == 1
    (own.root / "copy" / "pictures.json").unlink()  # half of a cache is none
    assert train(path, own.root / "half", "--cfg-options", f"cache_path={own.root / 'copy'}") == 2
    assert "no file or folder" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- building, killed


def build_until(path, work_dir, seconds):
    """Build the cache; die in the middle of it, after so many seconds."""
    whole = TokenCache._build

    def build_with_a_limit(cache, builder, write, what):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process, as SIGKILL does
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return whole(cache, builder, write, what)

    TokenCache._build = build_with_a_limit
    build(path, work_dir)


def test_a_build_killed_at_ten_moments_goes_on_and_ends_equal(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_tables, "CHUNK", 4)
    path = toy.config("killed", **{**CACHED, "image_variations": 16, "cache": True})
    took, whole = [], TokenCache._build

    def timed(cache, builder, write, what):
        began = time.perf_counter()
        table = whole(cache, builder, write, what)
        took.append(time.perf_counter() - began)
        return table

    monkeypatch.setattr(TokenCache, "_build", timed)
    build(path, tmp_path / "whole" / "run")
    monkeypatch.setattr(TokenCache, "_build", whole)
    moments = random.Random(0)
    codes, parts = [], []
    for _ in range(10):
        codes.append(in_child(build_until, path, tmp_path / "killed" / "run", moments.uniform(0.01, took[0] / 3)))
        parts.append(len(list(tmp_path.glob("killed/cache/*/*.chunks/*.arrow"))))
        complete = [table.fingerprint is not None for table in tables(tmp_path / "killed" / "run")]
        assert complete[0] or not complete[1]
    assert codes.count(-signal.SIGALRM) >= 3
    assert len({count for count in parts if 0 < count < 40}) >= 2  # some died in between
    build(path, tmp_path / "killed" / "run")
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")
    assert not list(tmp_path.glob("killed/cache/*/*.chunks*"))


def snapshot(root):
    return {file.name: file.read_bytes() for file in sorted(root.glob("cache/*/*.arrow"))}


def test_a_part_is_not_encoded_twice(own, encoded, monkeypatch):
    monkeypatch.setattr(cache_tables, "CHUNK", 4)
    monkeypatch.setattr(TableBuilder, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        start(own, encoded)
    monkeypatch.undo()
    monkeypatch.setattr(cache_tables, "CHUNK", 4)
    assert len(list(own.root.glob("kept/*.chunks/*.arrow"))) == 8
    build(own.config("again", **CACHED, cache=True, cache_path=str(own.root / "kept")), own.root / "run")
    assert len(Table(own.root / "kept" / "pictures.arrow")) == 30


def test_a_build_that_goes_on_needs_room_for_the_rest_only(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_tables, "CHUNK", 4)
    options = {"cache": True, "cache_path": str(tmp_path / "kept")}
    with monkeypatch.context() as killed:
        killed.setattr(TableBuilder, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pieces(toy, tmp_path / "run", **options)
    row = 1 + 8 + 64 + 5 * 4  # readable, weight, token ids, micro-conditions
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(token_cache.shutil, "disk_usage", lambda path: usage._replace(free=10 * V * row - 1))
    with pytest.raises(UserError, match="the cache needs"):
        pieces(toy, tmp_path / "run", **options)
    monkeypatch.setattr(token_cache.shutil, "disk_usage", lambda path: usage._replace(free=10 * V * row))
    pieces(toy, tmp_path / "run", **options)


def test_two_ranks_build_one_cache_and_take_one_step(toy, tmp_path):
    path = toy.config("ranks", **{**CACHED, "max_iters": 2, "cache": True})
    on_ranks(2, _train_on_rank, path, tmp_path / "two" / "run")
    assert train(path, tmp_path / "one" / "run") == 0
    assert snapshot(tmp_path / "two") == snapshot(tmp_path / "one")
    assert metrics(tmp_path / "two" / "run")[0]["loss"] == pytest.approx(
        metrics(tmp_path / "one" / "run")[0]["loss"], rel=1e-6
    )


def _train_on_rank(path, work_dir):
    build(path, work_dir).train()


def test_the_command_builds_what_training_then_takes(own, encoded, capsys):
    path = own.config("ahead", **{**CACHED, "max_iters": 9})
    assert cli.main(["cache", path, "--work-dir", str(own.root / "run")]) == 0
    assert (encoded["images"], encoded["captions"]) == (BUILD, 11)
    assert not (own.root / "run").exists()
    encoded.update(images=0, captions=0)
    assert train(path, own.root / "run") == 0
    assert (encoded["images"], encoded["captions"]) == (CHECK, 0)
    assert cli.main(["cache", path, "--cfg-options", "cache=False"]) == 2
    assert "trains without a token cache" in capsys.readouterr().err


def test_a_cache_inside_the_images_is_refused(own):
    with pytest.raises(UserError, match="lies inside the data"):
        pieces(own, own.root / "run", cache=True, cache_path=str(own.data / "kept"))


@pytest.mark.parametrize("name", ["captions.json", "pictures.json", "files.json", "pictures.arrow"])
@pytest.mark.parametrize("content", ['{"images": []}', "[1]"])
def test_files_of_another_kind_are_not_overwritten(own, name, content):
    """captions.json is how many a data set calls its own."""
    folder = own.root / "kept"
    folder.mkdir()
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"the cache would overwrite {name} in .* new or empty"):
        pieces(own, own.root / "run", cache=True, cache_path=str(folder))
    assert [(file.name, file.read_text()) for file in folder.iterdir()] == [(name, content)]


@pytest.mark.parametrize("below", ["", "deeper/down"])
def test_a_file_in_the_place_of_the_folder_is_told(own, below):
    (own.root / "kept").write_text("a file")
    with pytest.raises(UserError, match=r"the cache cannot be in .*: '.*kept' is not a folder; set cache_path"):
        pieces(own, own.root / "run", cache=True, cache_path=str(own.root / "kept" / below))


@pytest.mark.gpu
def test_encoders_are_off_the_device_while_training(toy, tmp_path):
    path = toy.config("gpu", **{**CACHED, "cache": True, "prompts": ["a cat"]})
    runner = build(path, tmp_path / "run", device=torch.device("cuda", 0))
    runner.train()
    frozen = runner.trainable._frozen.values()
    assert {str(device) for module in frozen for device in module.devices.values()} == {"cpu"}
