"""Training from the token cache equals encoding at each step; when a run uses the cache, and when it refuses it."""

import shutil
import signal

import pytest
import torch

from diffengine import cli
from diffengine.cache import token_cache
from diffengine.datasets import collate
from diffengine.errors import UserError
from tests.cache.caches import (
    BUILD,
    CACHED,
    CHECK,
    VARIATIONS,
    build_cached,
    count_encoded,
    flip,
    image_files,
    table_bytes,
    tables,
    weighted_images,
)
from tests.cache.test_fingerprint import change_weight
from tests.engine.runs import (
    WITH_TEXT_ENCODER,
    assert_equal_checkpoints,
    build,
    first_step,
    in_child,
    metrics,
    on_ranks,
    signal_at,
    train,
)


def test_cached_samples_equal_samples_encoded_at_each_step(toy, tmp_path):
    online = build_cached(toy, tmp_path / "online", cache=False, flip=0.5).train_loop.stream
    runner = build_cached(toy, tmp_path / "cached", cache=True)
    cached, encoder = runner.train_loop.stream, runner.trainable.encoder
    assert cached.cached_sample is not None
    assert online.cached_sample is None
    distinct_ids = set()
    for start in range(0, 10 * (VARIATIONS + 1), 4):  # one epoch more than there are variations
        positions = range(start, start + 4)
        raw_samples = online.__getitems__(positions)
        cached_samples = cached.__getitems__(positions)
        encoded = encoder.encode_images(torch.stack([sample["image"] for sample in raw_samples]))["token_ids"]
        for row, (raw, sample) in enumerate(zip(raw_samples, cached_samples)):
            assert torch.equal(sample["token_ids"], encoded[row])
            assert sample["token_ids"].dtype == torch.uint8  # 64 codes
            assert torch.equal(raw["micro_conds"], sample["micro_conds"])
            assert raw["masked"].tolist() == sample["masked"].tolist()
            assert (raw["text"], raw["num_targets"]) == (sample["text"], sample["num_targets"])
            assert "image" not in sample
            distinct_ids.add(sample["token_ids"].numpy().tobytes())
    assert len(distinct_ids) > 15  # 10 images, most of them in several variations


@pytest.mark.parametrize("train_text", [True, False])
def test_loss_and_gradients_from_the_cache(toy, tmp_path, train_text):
    options = [WITH_TEXT_ENCODER] if train_text else []
    path = toy.config("step", **{**CACHED, "max_iters": 1})
    online = first_step(path, tmp_path / "online", *options, "cache=False")
    cached = first_step(path, tmp_path / "cached", *options, "cache=True")
    assert cached.masked == online.masked
    assert cached.targets == online.targets
    columns = set(tables(tmp_path / "cached")[1][0]) - {"text"}
    if train_text:  # the cache holds caption ids only: bit-identical
        assert columns == {"text_ids"}
        assert cached.loss_sum == online.loss_sum
        assert all(torch.equal(one, other) for one, other in zip(cached.grads, online.grads))
    else:  # the captions were encoded in other batches: equal up to rounding
        assert columns == {"hidden_states", "pooled_text_emb"}
        assert cached.loss_sum == pytest.approx(online.loss_sum, rel=1e-6)
        for one, other in zip(cached.grads, online.grads):
            assert (one - other).norm() <= 1e-5 * other.norm().clamp_min(1e-6)


WORDS = {"shuffle_tags": True, "drop_tags": 0.2, "tag_separator": " ", "keep_tags": 0}  # the captions' words as tags


def test_varied_captions_from_the_cache(toy_copy, encoded, capsys):
    """The cache holds each variation; without a limit the text encoder runs at each step, and a line says why."""
    root = toy_copy.root
    cache = {"cache": True, "cache_path": str(root / "kept"), **WORDS}
    assert count_encoded(toy_copy, encoded) == (BUILD, 11)
    online = build_cached(toy_copy, root / "online", cache=False, **WORDS, caption_variations=2).train_loop.stream
    every = token_cache.distinct_captions(online.dataset, online)
    assert 25 < len(every) <= 11 + 10 * 2
    for change in (len(every), 0):
        encoded.update(images=0, captions=0)
        run = build_cached(toy_copy, root / f"cached{change}", **cache, caption_variations=2)
        assert encoded == {"images": CHECK, "captions": change}
    cached = run.train_loop.stream
    texts = [cached[position]["text"] for position in range(60)]
    assert texts == [online[position]["text"] for position in range(60)]
    assert {*texts} <= {*every}
    assert [cached.fixed_sample(index)["text"] for index in range(10)] == [[text] for text in every[1:11]]
    batch = run.trainable.prepare(collate(cached.__getitems__(range(8))))
    assert "text_ids" not in batch
    hidden, pooled = run.trainable.encode_text(run.trainable.preprocessor.text_ids(texts[:8]))
    assert torch.allclose(batch["hidden_states"], hidden, atol=1e-5)  # encoded in other batches
    assert torch.allclose(batch["pooled_text_emb"], pooled, atol=1e-5)

    encoded.update(images=0, captions=0)
    capsys.readouterr()
    run = build_cached(toy_copy, root / "unlimited", **cache)
    assert encoded == {"images": CHECK, "captions": 11}
    reason = "tags are drawn again each time; set caption_variations to how many to keep of a caption"
    assert f"token cache: the text encoder runs at each step, since {reason}\n" in capsys.readouterr().out
    samples = run.train_loop.stream.__getitems__(range(8))
    ids = run.trainable.preprocessor.text_ids([sample["text"] for sample in samples])
    assert torch.equal(run.trainable.prepare(collate(samples))["text_ids"], ids)
    with pytest.raises(UserError, match=f"^text_embeddings=True, but {reason}$"):
        build_cached(toy_copy, root / "must", "token_cache.text_embeddings=True", **cache)


@pytest.mark.parametrize(
    ("choice", "limit", "stored"),
    [(True, 0, True), ("auto", 10**9, True), ("auto", 0, False), (False, 10**9, False)],
)
def test_captions_are_stored_as_embeddings_or_as_ids(toy, tmp_path, monkeypatch, choice, limit, stored):
    monkeypatch.setattr(token_cache, "MAX_EMBEDDINGS", limit)
    build_cached(toy, tmp_path / "run", f"token_cache.text_embeddings={choice}", cache=True)
    row = token_cache.caption_table(next((tmp_path / "cache").iterdir()))[0]
    assert row.keys() == ({"hidden_states", "pooled_text_emb", "text"} if stored else {"text_ids", "text"})


@pytest.mark.soak  # benchmarks/soak.py does this and more
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(toy, tmp_path):
    path = toy.config("whole", **{**CACHED, "max_iters": 6, "checkpoint_every": 2})
    assert train(path, tmp_path / "whole", "--cfg-options", "cache=True") == 0
    options = ["--cfg-options", "cache=True", signal_at(3, signal.SIGKILL)]
    assert in_child(train, path, tmp_path / "killed", *options) == -signal.SIGKILL
    assert train(path, tmp_path / "killed", "--resume", "--cfg-options", "cache=True") == 0
    assert_equal_checkpoints(tmp_path / "whole" / "iter_6.pth", tmp_path / "killed" / "iter_6.pth")
    # If the text encoder is trained, a run with the cache also equals one without, bit for bit.
    text = toy.config("text", **{**CACHED, "max_iters": 3})
    for name, use in (("on", True), ("off", False)):
        assert train(text, tmp_path / name, "--cfg-options", f"cache={use}", WITH_TEXT_ENCODER) == 0
    assert_equal_checkpoints(tmp_path / "on" / "iter_3.pth", tmp_path / "off" / "iter_3.pth")


@pytest.mark.parametrize("odd", [0, 1])
def test_a_weight_that_only_some_samples_have_is_kept(toy_copy, odd):
    option = weighted_images(toy_copy, odd)
    online = build_cached(toy_copy, toy_copy.root / "online", option, cache=False).train_loop.stream
    cached = build_cached(toy_copy, toy_copy.root / "cached", option, cache=True).train_loop.stream
    weights = [cached[position].get("weight") for position in range(10)]
    assert weights == [online[position].get("weight") for position in range(10)]
    assert sorted(weights, key=str) == [0.25] * 5 + [None] * 5


def test_an_unreadable_image_is_replaced_as_without_a_cache(toy_copy):
    image_files(toy_copy)[4].write_bytes(b"no image")
    skip = {"train_dataloader": {"skip_unreadable": True}}
    online = build_cached(toy_copy, toy_copy.root / "online", cache=False, **skip).train_loop.stream
    cached = build_cached(toy_copy, toy_copy.root / "cached", cache=True, **skip).train_loop.stream
    for position in range(40):
        one, other = online[position], cached[position]
        assert (one["text"], one["skipped"]) == (other["text"], other["skipped"])
        assert torch.equal(one["micro_conds"], other["micro_conds"])
    assert sum(cached[position]["skipped"] for position in range(10)) == 1


def test_two_ranks_build_one_cache_and_take_one_step(toy, tmp_path):
    path = toy.config("ranks", **{**CACHED, "max_iters": 2, "cache": True})
    on_ranks(2, _train_on_rank, path, tmp_path / "two" / "run")
    assert train(path, tmp_path / "one" / "run") == 0
    assert table_bytes(tmp_path / "two") == table_bytes(tmp_path / "one")
    assert metrics(tmp_path / "two" / "run")[0]["loss"] == pytest.approx(
        metrics(tmp_path / "one" / "run")[0]["loss"], rel=1e-6
    )


def _train_on_rank(path, work_dir):
    build(path, work_dir).train()


@pytest.mark.gpu
def test_encoders_are_off_the_device_while_training(toy, tmp_path):
    path = toy.config("gpu", **{**CACHED, "cache": True, "prompts": ["a cat"]})
    runner = build(path, tmp_path / "run", device=torch.device("cuda", 0))
    runner.train()
    frozen = runner.trainable._frozen.values()
    assert {str(device) for module in frozen for device in module.devices.values()} == {"cpu"}


# ---------------------------------------------------------------------------------- when a run uses the cache


ONE_VARIATION = {"image_variations": None, "flip": 0.0, "random_crop": False}


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        ({"max_iters": 8}, True),  # 32 samples of 10 images in 3 variations
        ({"max_iters": 7}, False),
        ({"max_iters": 8, "image_variations": None}, False),
        ({"max_iters": 3, **ONE_VARIATION}, True),
        ({"max_iters": 2, **ONE_VARIATION}, False),
    ],
)
def test_auto_uses_a_cache_if_variations_repeat(toy, tmp_path, capsys, settings, used):
    runner = build_cached(toy, tmp_path / "run", **settings)
    assert (runner.train_loop.stream.cached_sample is not None) == used
    assert ("token cache: 10 images in" in capsys.readouterr().out) == used
    assert (tmp_path / "cache").exists() == used


def test_a_cache_that_is_asked_for_and_cannot_be_used_is_an_error(toy, tmp_path):
    with pytest.raises(UserError, match=r"crop and flip are drawn again .* set image_variations"):
        build_cached(toy, tmp_path / "run", cache=True, image_variations=None)
    with pytest.raises(UserError, match="text_embeddings=True, but the text encoder is trained"):
        build_cached(toy, tmp_path / "run", "token_cache.text_embeddings=True", WITH_TEXT_ENCODER, cache=True)
    with pytest.raises(UserError, match="this model learns from pixels"):
        build(toy.vq_config("vq", 1, 1), tmp_path / "run", "token_cache={'use': True}")


def test_samples_that_cannot_be_stored_are_encoded_at_each_step(toy, tmp_path):
    option = f"train_dataloader.dataset={{'type': 'tests.cache.caches.NamedImages', 'path': {str(toy.data)!r}}}"
    assert build_cached(toy, tmp_path / "auto", option).train_loop.stream.cached_sample is None
    with pytest.raises(UserError, match=r"it takes tensors and numbers, not name .str"):
        build_cached(toy, tmp_path / "asked", option, cache=True)


def test_the_cache_command_builds_what_training_uses(toy_copy, encoded, capsys):
    path = toy_copy.config("ahead", **{**CACHED, "max_iters": 9})
    assert cli.main(["cache", path, "--work-dir", str(toy_copy.root / "run")]) == 0
    assert (encoded["images"], encoded["captions"]) == (BUILD, 11)
    assert not (toy_copy.root / "run").exists()
    encoded.update(images=0, captions=0)
    assert train(path, toy_copy.root / "run") == 0
    assert (encoded["images"], encoded["captions"]) == (CHECK, 0)
    assert cli.main(["cache", path, "--cfg-options", "cache=False"]) == 2
    assert "trains without a token cache" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- without the images


def test_a_copied_cache_is_used_without_the_images(toy_copy, encoded, capsys):
    root = toy_copy.root
    settings = {"cache_path": str(root / "kept"), "prompts": 2}
    path = toy_copy.config("away", **{**CACHED, "max_iters": 9, **settings})
    assert train(path, root / "here") == 0
    shutil.copytree(root / "kept", root / "copy")
    shutil.rmtree(toy_copy.data)
    encoded.update(images=0, captions=0)
    assert train(path, root / "there", "--cfg-options", f"cache_path={root / 'copy'}") == 0
    assert encoded == {"images": 0, "captions": 0}
    assert f"training from the cache '{root / 'copy'}' alone" in capsys.readouterr().out
    assert_equal_checkpoints(root / "here" / "iter_9.pth", root / "there" / "iter_9.pth")
    short = ["--cfg-options", f"cache_path={root / 'copy'}", "max_iters=1"]
    assert train(path, root / "short", *short) == 0  # although no variation repeats
    assert "token cache: 10 images" in capsys.readouterr().out
    assert train(path, root / "prefix", *short, "train_dataloader.dataset.prefix='a '") == 2
    assert "the images to build it again are not here: changed since it was built: data set" in (
        capsys.readouterr().err
    )
    for file in ("pictures.arrow", "pictures.json"):
        flip(root / "copy" / file, 700)
        assert train(path, root / "damaged", *short) == 2
        error = capsys.readouterr().err
        assert f"'{root / 'copy' / file}'" in error
        assert "damaged" in error
        assert error.count("\n") == 1
        flip(root / "copy" / file, 700)
    toy_copy.data.mkdir()
    assert train(path, root / "empty", *short) == 2  # an image folder that exists is read, even if it is empty
    assert "training from the cache" not in capsys.readouterr().out
    toy_copy.data.rmdir()
    change_weight("vqvae", "encoder.conv_in")(toy_copy)
    assert train(path, root / "other", "--cfg-options", f"cache_path={root / 'copy'}") == 2
    error = capsys.readouterr().err
    assert "does not fit this run, and the images to build it again are not here" in error
    assert "VQ model" in error
    assert error.count("\n") == 1
    (root / "copy" / "pictures.json").unlink()  # an incomplete cache is not used
    assert train(path, root / "half", "--cfg-options", f"cache_path={root / 'copy'}") == 2
    assert "no file or folder" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- folders that are refused


def test_a_full_disk_is_reported_before_the_build(toy, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(token_cache.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"the cache needs .* free; free space, set cache_path"):
        build_cached(toy, tmp_path / "run", cache=True)


def test_a_cache_inside_the_image_folder_is_refused(toy_copy):
    with pytest.raises(UserError, match="lies inside the data"):
        build_cached(toy_copy, toy_copy.root / "run", cache=True, cache_path=str(toy_copy.data / "kept"))


@pytest.mark.parametrize("name", ["captions.json", "pictures.json", "files.json", "pictures.arrow"])
@pytest.mark.parametrize("content", ['{"images": []}', "[1]"])
def test_files_of_other_programs_are_not_overwritten(toy_copy, name, content):
    """captions.json is a common name in data sets."""
    folder = toy_copy.root / "kept"
    folder.mkdir()
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"the cache would overwrite {name} in .* new or empty"):
        build_cached(toy_copy, toy_copy.root / "run", cache=True, cache_path=str(folder))
    assert [(file.name, file.read_text()) for file in folder.iterdir()] == [(name, content)]


@pytest.mark.parametrize("subfolder", ["", "deeper/down"])
def test_a_file_at_the_path_of_the_folder_is_reported(toy_copy, subfolder):
    (toy_copy.root / "kept").write_text("a file")
    path = toy_copy.root / "kept" / subfolder
    with pytest.raises(UserError, match=r"the cache cannot be in .*: '.*kept' is not a folder; set cache_path"):
        build_cached(toy_copy, toy_copy.root / "run", cache=True, cache_path=str(path))
