"""Tests of tests/support: small models in the released layout, photos, and a hub cache with the real names."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AmusedImg2ImgPipeline, AmusedInpaintPipeline, AmusedPipeline
from PIL import Image
from transformers import CLIPTokenizer

from tests.support import hub, models, photos

CAPTIONS = ["", "a cat", "a dog", "a photo of a cat", "yoda pokemon", "你好, pokémon!"]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_model_folder(tmp_path_factory.mktemp("model") / "tiny")


def generate(pipeline: Any, *arguments: Any, **options: Any) -> Image.Image:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(*arguments, num_inference_steps=2, generator=generator, **options).images[0]


def tokens(vqvae: Any, image: Image.Image) -> torch.Tensor:
    """The (h * w,) token ids of an image."""
    pixels = torch.tensor(np.asarray(image), dtype=torch.float32).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        return vqvae.quantize(vqvae.encode(pixels).latents)[2][2]


# --- hub

HUB_PROGRAM = """
import json, sys
from datasets import load_dataset
from diffusers import AmusedPipeline, UVit2DModel
from transformers import CLIPTokenizer

pipeline = AmusedPipeline.from_pretrained("amused/amused-512")
transformer = UVit2DModel.from_pretrained("amused/amused-512", subfolder="transformer")
tokenizer = CLIPTokenizer.from_pretrained("amused/amused-512", subfolder="tokenizer")
rows = load_dataset("reach-vb/pokemon-blip-captions", split="train")
folder = load_dataset("imagefolder", data_dir=sys.argv[1], split="train")
print(json.dumps({
    "sample_size": [pipeline.transformer.config.sample_size, transformer.config.sample_size],
    "tokenizer": len(tokenizer),
    "columns": rows.column_names,
    "rows": len(rows),
    "text": rows[1]["text"],
    "size": rows[1]["image"].size,
    "folder": [folder.column_names, folder[1]["text"], folder[1]["image"].size],
}))
"""


@pytest.fixture(scope="module")
def hub_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub_child(hub_root: Path, tiny_folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that uses the cache. It starts early and is read last, because its imports take 7 s."""
    variables = hub.make_hub_cache(
        hub_root,
        models={"amused/amused-512": tiny_folder},
        datasets={"reach-vb/pokemon-blip-captions": hub.photo_rows(12, size=64)},
    )
    photos.write_photo_folder(hub_root / "photos", n=4, size=48)
    child = subprocess.Popen(
        [sys.executable, "-c", HUB_PROGRAM, str(hub_root / "photos")],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield child
    child.kill()
    child.wait()


@pytest.mark.usefixtures("hub_child")
def test_hub_cache_layout(hub_root: Path) -> None:
    model = hub_root / "hub" / "models--amused--amused-512"
    revision = (model / "refs" / "main").read_text()
    assert len(revision) == 40
    assert (model / "snapshots" / revision / "model_index.json").is_file()
    [rows] = (hub_root / "datasets" / "reach-vb___pokemon-blip-captions" / "default" / "0.0.0").iterdir()
    assert {file.name for file in rows.iterdir()} >= {
        "dataset_info.json",
        "pokemon-blip-captions-train.arrow",
    }


# --- models


@pytest.mark.parametrize("resolution", [256, 512])
def test_full_configs_have_the_released_parameter_counts(resolution: int) -> None:
    assert models.count_parameters("full", resolution) == models.FULL_PARAMETERS[resolution]


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open-clip-torch is not installed")
def test_full_tokenizer_matches_clip() -> None:
    tokenizer = models.make_tokenizer("full")
    assert len(tokenizer) == models.text_config("full")["vocab_size"] == 49_408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parametrize(
    ("size", "resolution", "factor", "resample"),
    [("tiny", 512, 16, True), ("tiny", 256, 16, False), ("toy", 32, 4, True), ("toy", 64, 4, True)],
)
def test_components_fit_each_other(size: models.Size, resolution: int, factor: int, resample: bool) -> None:
    vq, transformer = models.vq_config(size), models.transformer_config(size, resolution)
    text, tokenizer = models.text_config(size), models.make_tokenizer(size)
    assert factor == 2 ** (len(vq["block_out_channels"]) - 1)
    assert transformer["sample_size"] * factor == resolution
    assert transformer["downsample"] is transformer["upsample"] is resample
    assert transformer["codebook_size"] == vq["num_vq_embeddings"] < transformer["vocab_size"]
    assert transformer["encoder_hidden_size"] == text["hidden_size"]
    assert transformer["cond_embed_dim"] == text["projection_dim"]
    assert transformer["micro_cond_embed_dim"] == 5 * transformer["micro_cond_encode_dim"]
    assert len(tokenizer) == text["vocab_size"]
    assert tokenizer.model_max_length == text["max_position_embeddings"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == max(tokenizer.get_vocab().values())
    assert text["eos_token_id"] in (2, tokenizer.eos_token_id)


def test_unknown_resolution_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"got resolution 64 .* expected one of \(256, 512\)"):
        models.make_pipeline("tiny", resolution=64)


def test_folder_has_the_released_layout(tiny_folder: Path) -> None:
    found = {str(file.relative_to(tiny_folder)) for file in tiny_folder.rglob("*") if file.is_file()}
    assert found == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vqvae/config.json",
        "vqvae/diffusion_pytorch_model.safetensors",
    }
    assert json.loads((tiny_folder / "scheduler/scheduler_config.json").read_text())["mask_token_id"] == 79


def test_tokenizer_loads_from_the_released_files_only(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_folder / "tokenizer" / name).read_bytes())
    whole = CLIPTokenizer.from_pretrained(tiny_folder / "tokenizer")
    old = CLIPTokenizer.from_pretrained(tmp_path)
    assert whole(CAPTIONS).input_ids == old(CAPTIONS).input_ids
    assert whole.decode(whole(CAPTIONS[-1]).input_ids, skip_special_tokens=True) == "你好 , pokémon !"


def test_seed_determines_weights_and_global_rng_is_kept() -> None:
    def weights(seed: int) -> torch.Tensor:
        pipeline = models.make_pipeline("toy", seed=seed)
        modules = (pipeline.transformer, pipeline.vqvae, pipeline.text_encoder)
        return torch.cat([value.flatten() for module in modules for value in module.parameters()]).detach()

    before = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)
    assert first.isfinite().all()


@pytest.mark.parametrize("size", ["tiny", "toy"])  # eos_token_id 2, and the tokenizer's own
def test_captions_have_distinct_embeddings(size: models.Size) -> None:
    pipeline = models.make_pipeline(size)
    length = pipeline.tokenizer.model_max_length
    ids = pipeline.tokenizer(CAPTIONS, padding="max_length", max_length=length, return_tensors="pt").input_ids
    with torch.no_grad():
        embeds = pipeline.text_encoder(ids).text_embeds
    assert embeds.shape == (len(CAPTIONS), models.transformer_config(size)["cond_embed_dim"])
    distances = torch.cdist(embeds, embeds) + torch.eye(len(CAPTIONS)) * 9
    assert distances.min() > 0.05 * embeds.norm(dim=1).mean()


def test_pipelines_generate(tiny_folder: Path) -> None:
    pipeline = AmusedPipeline.from_pretrained(tiny_folder)
    image = generate(pipeline, "a cat")
    assert image.size == (512, 512)
    assert (np.asarray(image).std(axis=(0, 1)) > 5).all()
    assert np.abs(np.asarray(image, int) - np.asarray(generate(pipeline, "a rocket"), int)).mean() > 1

    photo = photos.photos()["astronaut"]
    changed = generate(AmusedImg2ImgPipeline(**pipeline.components), "a cat", photo, strength=0.5)
    assert changed.size == (512, 512)
    mask = Image.new("L", photo.size)
    mask.paste(255, (0, 0, 256, 512))
    changed = generate(AmusedInpaintPipeline(**pipeline.components), "a cat", photo, mask)
    assert changed.size == (512, 512)


@pytest.mark.parametrize(("size", "resolution"), [("tiny", 256), ("toy", 32)])
def test_small_models_generate_and_encode(size: models.Size, resolution: int) -> None:
    pipeline = models.make_pipeline(size, resolution=resolution)
    assert generate(pipeline, "a cat").size == (resolution, resolution)
    photo = photos.photos()["astronaut"].resize((resolution, resolution))
    assert len(tokens(pipeline.vqvae, photo).unique()) > 20  # of 64


# --- images


def test_photos_are_colour_photos() -> None:
    originals = photos.photos()
    assert len(originals) == len(set(photos.captions().values())) == 9
    for image in originals.values():
        assert image.mode == "RGB"
        assert min(image.size) >= 300
        red, green, _ = np.asarray(image, int).transpose(2, 0, 1)
        assert np.abs(red - green).mean() > 1


def test_captioned_photos_are_distinct_and_reproducible() -> None:
    rows = photos.captioned_photos(25, size=32)
    names, images, texts = zip(*rows)
    assert len(set(names)) == len(set(texts)) == len({image.tobytes() for image in images}) == 25
    assert {image.size for image in images} == {(32, 32)}
    assert [image.tobytes() for _, image, _ in photos.captioned_photos(25, size=32)] == [
        image.tobytes() for image in images
    ]


def test_photo_folder_in_each_caption_format(tmp_path: Path) -> None:
    texts = photos.write_photo_folder(tmp_path / "csv", n=3)
    assert list(texts) == ["astronaut.jpg", "cat.png", "coffee.jpg"]
    with Image.open(tmp_path / "csv" / "cat.png") as image:
        assert image.size == (451, 300)
    with open(tmp_path / "csv" / "metadata.csv", newline="", encoding="utf-8") as table:
        assert {row["file_name"]: row["text"] for row in csv.DictReader(table)} == texts

    assert photos.write_photo_folder(tmp_path / "jsonl", n=3, size=48, captions="jsonl") == texts
    lines = (tmp_path / "jsonl" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert {row["file_name"]: row["text"] for row in map(json.loads, lines)} == texts

    assert photos.write_photo_folder(tmp_path / "txt", n=3, size=48, captions="txt") == texts
    assert (tmp_path / "txt" / "cat.txt").read_text(encoding="utf-8") == texts["cat.png"] + "\n"
    with Image.open(tmp_path / "txt" / "cat.png") as image:
        assert image.size == (48, 48)


# --- output of the hub process


def test_hub_names_work_offline(hub_child: subprocess.Popen[str]) -> None:
    out, err = hub_child.communicate(timeout=120)
    assert hub_child.returncode == 0, err
    assert json.loads(out.splitlines()[-1]) == {
        "sample_size": [32, 32],
        "tokenizer": len(models.make_tokenizer("tiny")),
        "columns": ["image", "text"],
        "rows": 12,
        "text": "a close photo of a cat",
        "size": [64, 64],
        "folder": [["image", "text"], "a close photo of a cat", [48, 48]],
    }
