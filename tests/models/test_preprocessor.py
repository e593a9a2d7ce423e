"""Pixels to tokens, captions to ids."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffengine.models.amused import AmusedModel
from tests.models.conftest import CAPTIONS, make_batch

CPU = torch.device("cpu")


def nearest(model: AmusedModel, pixels: Tensor) -> Tensor:
    """Token ids (B,h,w), written from the definition: the code at the least distance."""
    vqvae = model.module("vqvae")
    with torch.no_grad():
        latents = vqvae.encode(pixels).latents.permute(0, 2, 3, 1)
    codes = vqvae.quantize.embedding.weight
    return (latents[..., None, :] - codes).square().sum(-1).argmin(-1)


def test_ids_are_the_nearest_codes(model: AmusedModel, batch: dict[str, Any]) -> None:
    token_ids = model.preprocessor.encode(batch["image"])
    assert token_ids.dtype == torch.int64
    assert token_ids.shape == (3, 8, 8)
    assert torch.equal(token_ids, nearest(model, batch["image"]))


def test_batches_above_the_chunk_size(toy: Path) -> None:
    """The reference scripts reshape each chunk by the whole batch's size, and crash."""
    pixels = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = AmusedModel(str(toy), vq_batch_size=3)
    one_by_one = torch.cat([model.preprocessor.encode(row[None]) for row in pixels])
    assert torch.equal(model.preprocessor.encode(pixels), one_by_one)


def test_pixels_are_in_0_1(model: AmusedModel, batch: dict[str, Any]) -> None:
    """AmusedPipeline has do_normalize=False; pixels in [-1, 1] give other tokens, with no error."""
    wrong = model.preprocessor.encode(batch["image"] * 2 - 1)
    assert (wrong != model.preprocessor.encode(batch["image"])).float().mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_it_changes_nothing(
    model: AmusedModel, batch: dict[str, Any], dtype: torch.dtype
) -> None:
    alone = model.preprocessor.encode(batch["image"])
    with torch.autocast("cpu", dtype):
        assert torch.equal(model.preprocessor.encode(batch["image"]), alone)


def test_what_the_transformer_is_given(model: AmusedModel, batch: dict[str, Any]) -> None:
    prepared = model.prepare(batch)
    tokenizer = model.components.tokenizer
    assert set(prepared) == {"token_ids", "micro_conds", "text_ids", "masked_index"}
    assert prepared["text_ids"].shape == (3, 64)  # the tokenizer's own length, not CLIP's 77
    said = tokenizer.batch_decode(prepared["text_ids"], skip_special_tokens=True)
    assert [text.strip() for text in said] == CAPTIONS
    assert prepared["masked_index"].tolist() == [
        int(place) + 64 * row for row, places in enumerate(batch["masked"]) for place in places
    ]
    assert torch.equal(prepared["micro_conds"], batch["micro_conds"])


def test_long_captions_are_cut_as_the_pipeline_cuts(model: AmusedModel) -> None:
    ids = model.preprocessor.text_ids(["a cat " * 200])
    assert ids.shape == (1, 64)
    assert ids[0, -1] == model.components.tokenizer.eos_token_id


def test_cached_tokens_pass_through(toy: Path, batch: dict[str, Any]) -> None:
    """With tokens given, the VQ model is not even loaded."""
    model = AmusedModel(str(toy))
    model.components.__dict__["vqvae"] = None  # where a load would put it
    ids = torch.arange(3 * 64, dtype=torch.int16).view(3, 8, 8)
    prepared = model.prepare({**batch, "token_ids": ids})
    assert prepared["token_ids"].dtype == torch.int64
    assert torch.equal(prepared["token_ids"], ids.long())


def test_an_odd_grid(model: AmusedModel) -> None:
    assert model.preprocessor.encode(make_batch(48)["image"]).shape == (3, 12, 12)
