"""Pixels to tokens, captions to ids."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffengine.models.amused import AmusedModel
from tests.models.conftest import CAPTIONS, make_batch

CPU = torch.device("cpu")


def nearest(model: AmusedModel, pixels: Tensor) -> Tensor:
    """Token ids (B,h,w) by definition: the code at the smallest distance."""
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


def test_batch_larger_than_a_chunk(toy: Path) -> None:
    """The reference scripts reshape each chunk to the size of the whole batch, and crash."""
    pixels = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = AmusedModel(str(toy), vq_batch_size=3)
    one_by_one = torch.cat([model.preprocessor.encode(row[None]) for row in pixels])
    assert torch.equal(model.preprocessor.encode(pixels), one_by_one)


def test_pixels_are_in_0_1(model: AmusedModel, batch: dict[str, Any]) -> None:
    """AmusedPipeline has do_normalize=False. Pixels in [-1, 1] give wrong tokens without an error."""
    wrong = model.preprocessor.encode(batch["image"] * 2 - 1)
    assert (wrong != model.preprocessor.encode(batch["image"])).float().mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_id(model: AmusedModel, batch: dict[str, Any], dtype: torch.dtype) -> None:
    expected = model.preprocessor.encode(batch["image"])
    with torch.autocast("cpu", dtype):
        assert torch.equal(model.preprocessor.encode(batch["image"]), expected)


def test_ids_match_diffusers(toy: Path) -> None:
    """Channels-last rounds differently from diffusers' call: an id changes where two codes are equally near."""
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    model = AmusedModel(str(toy))
    vqvae = model.module("vqvae")
    latents: list[Tensor] = []
    handle = vqvae.quantize.register_forward_pre_hook(lambda _, given: latents.append(given[0].clone()))
    ids = model.preprocessor.encode(pixels)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(ids.flatten(), vqvae.quantize(latents[0])[2][2])  # the same latents give the same ids
        expected = vqvae.quantize(vqvae.encode(pixels).latents)[2][2].view(4, 8, 8)
    assert (expected == ids).float().mean() >= 0.99


TF32 = (torch.backends.cuda.matmul, torch.backends.cudnn)


@pytest.fixture(params=[True, False])
def tf32(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = [backend.allow_tf32 for backend in TF32]
    for backend in TF32:
        backend.allow_tf32 = request.param
    yield request.param
    for backend, allowed in zip(TF32, before):
        backend.allow_tf32 = allowed


def test_encoding_runs_in_fp32_and_ids_work_with_autograd(toy: Path, tf32: bool) -> None:
    """Encoder and codebook run without TF32 and autocast; both settings are restored afterwards."""
    model = AmusedModel(str(toy))
    vqvae = model.module("vqvae")
    seen = []

    def record(module: nn.Module, given: tuple[Tensor]) -> None:
        seen.append([backend.allow_tf32 for backend in TF32] + [torch.is_autocast_enabled("cpu")])
        assert given[0].dtype == torch.float32
        assert given[0].is_inference()

    for module in (vqvae.encoder, vqvae.quantize):
        module.register_forward_pre_hook(record)
    with torch.autocast("cpu", torch.bfloat16):
        ids = model.preprocessor.encode(torch.rand(1, 3, 32, 32))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [[False, False, False]] * 2
    assert [backend.allow_tf32 for backend in TF32] == [tf32, tf32]
    with pytest.raises(RuntimeError, match="channels"):
        model.preprocessor.encode(torch.rand(1, 2, 32, 32))
    assert [backend.allow_tf32 for backend in TF32] == [tf32, tf32]

    assert not ids.is_inference()
    table = nn.Embedding(64, 2)
    table(ids).sum().backward()  # saves the ids for the backward pass
    assert table.weight.grad is not None
    assert table.weight.grad[:, 0].tolist() == ids.flatten().bincount(minlength=64).tolist()


def test_prepared_batch(model: AmusedModel, batch: dict[str, Any]) -> None:
    prepared = model.prepare(batch)
    tokenizer = model.components.tokenizer
    assert set(prepared) == {"token_ids", "micro_conds", "text_ids", "masked_index"}
    assert prepared["text_ids"].shape == (3, 64)  # the tokenizer's own length, not CLIP's 77
    texts = tokenizer.batch_decode(prepared["text_ids"], skip_special_tokens=True)
    assert [text.strip() for text in texts] == CAPTIONS
    assert prepared["masked_index"].tolist() == [
        int(index) + 64 * row for row, indices in enumerate(batch["masked"]) for index in indices
    ]
    assert torch.equal(prepared["micro_conds"], batch["micro_conds"])


def test_long_captions_are_truncated(model: AmusedModel) -> None:
    ids = model.preprocessor.text_ids(["a cat " * 200])
    assert ids.shape == (1, 64)
    assert ids[0, -1] == model.components.tokenizer.eos_token_id


def test_cached_tokens_pass_through(toy: Path, batch: dict[str, Any]) -> None:
    """With cached tokens, the VQ model is not loaded."""
    model = AmusedModel(str(toy))
    ids = torch.arange(3 * 64, dtype=torch.int16).view(3, 8, 8)
    prepared = model.prepare({**batch, "token_ids": ids})
    assert prepared["token_ids"].dtype == torch.int64
    assert torch.equal(prepared["token_ids"], ids.long())
    assert model._frozen["vqvae"].devices == {}


def test_another_resolution(model: AmusedModel) -> None:
    assert model.preprocessor.encode(make_batch(48)["image"]).shape == (3, 12, 12)


def test_inplace_activations_change_no_id(toy: Path, batch: dict[str, Any]) -> None:
    model = AmusedModel(str(toy))
    vqvae = model.module("vqvae")
    activations = [layer for layer in vqvae.encoder.modules() if isinstance(layer, nn.SiLU)]
    assert activations
    assert all(layer.inplace for layer in activations)
    image = batch["image"].clone()
    ids = model.preprocessor.encode(image)
    assert torch.equal(image, batch["image"])
    for layer in activations:
        layer.inplace = False
    assert torch.equal(ids, model.preprocessor.encode(image))
