"""Training the VQ model: the loss against its formula, and reseeding of unused codes."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import VQModel
from PIL import Image
from torch import Tensor

from diffengine.errors import UserError
from diffengine.export import export_components
from diffengine.models.base import PreviewRequest
from diffengine.models.vq import VQTokenizerModel
from tests.support import models, photos

SIZES = {key: value for key, value in models.vq_config("toy").items() if key != "lookup_from_codebook"}


def batches(count: int, size: int = 32) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(0)
    return [{"image": torch.rand(4, 3, size, size, generator=rng)} for _ in range(count)]


def train(model: VQTokenizerModel, given: list[dict[str, Tensor]], start: int = 0, optimizer: Any = None) -> Any:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, batch in enumerate(given, start):
        model.before_step(step)
        loss, _ = model(model.prepare(batch))
        optimizer.zero_grad()
        loss.backward()
        model.after_passes()
        optimizer.step()
    return optimizer


def test_model_from_sizes_fits_the_pipeline() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (VQTokenizerModel(SIZES, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.vqvae.config.lookup_from_codebook is True
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
    assert not torch.equal(one.vqvae.quant_conv.weight, other.vqvae.quant_conv.weight)


def test_loss_and_metrics_match_the_formula(toy: Path) -> None:
    weights = {"l1_weight": 0.7, "mse_weight": 1.3, "codebook_weight": 0.9, "commitment_weight": 0.4}
    model = VQTokenizerModel(str(toy), **weights)
    pixels = batches(1)[0]["image"]
    loss, logs = model({"image": pixels})
    loss.backward()
    model.after_passes()
    vqvae = VQModel.from_pretrained(toy / "vqvae")
    latents = vqvae.encode(pixels).latents
    codes = vqvae.quantize.embedding.weight
    ids = (latents.movedim(1, -1)[..., None, :] - codes).square().sum(-1).argmin(-1)
    quantized = codes[ids].movedim(-1, 1)
    straight_through = latents + (quantized - latents).detach()
    decoded = vqvae.decoder(vqvae.post_quant_conv(straight_through))
    expected = torch.zeros(())
    psnr = 0.0
    for row in range(4):
        error = decoded[row] - pixels[row]
        expected = (
            expected
            + 0.7 * error.abs().mean()
            + 1.3 * error.square().mean()
            + 0.9 * (quantized[row] - latents[row].detach()).square().mean()
            + 0.4 * (quantized[row].detach() - latents[row]).square().mean()
        )
        psnr += 10 * math.log10(1 / float(error.detach().square().mean()))
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(logs["psnr"]) == pytest.approx(psnr, rel=1e-5)
    for (name, ours), theirs in zip(model.vqvae.named_parameters(), vqvae.parameters()):
        assert ours.grad is not None, name
        assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max().clamp_min(1e-3), name
    counts = torch.bincount(ids.flatten(), minlength=64).double()
    share = (counts / counts.sum())[counts > 0]
    metrics = model.extra_metrics()
    assert metrics["codes_used"] == int((counts > 0).sum())
    assert metrics["perplexity"] == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-5)


def test_training_before_quantization(toy: Path) -> None:
    """The model is a plain autoencoder at first. The codes are then initialised from latents."""
    model = VQTokenizerModel(str(toy), quantize_after=2, l1_weight=0.0)
    pixels = batches(1)[0]["image"]
    model.before_step(0)
    loss, _ = model({"image": pixels})
    loss.backward()
    plain = model.vqvae.decoder(model.vqvae.post_quant_conv(model.vqvae.encode(pixels).latents))
    assert float(loss.detach()) == pytest.approx(4 * float((plain - pixels).square().mean().detach()), rel=1e-5)
    assert not model.vqvae.quantize.embedding.weight.grad.any()  # zero, but not None, for DDP
    assert model.extra_metrics() == {}  # no code is in use yet
    model.before_step(2)
    latents = model.vqvae.encode(pixels).latents.detach().movedim(1, -1).flatten(0, 2)
    model({"image": pixels})
    codes = model.vqvae.quantize.embedding.weight.detach()
    distances = (codes[:, None] - latents).square().sum(-1).min(dim=1).values
    assert distances.max() < 1e-8


def test_only_unused_codes_are_reseeded(toy: Path) -> None:
    model = VQTokenizerModel(str(toy), reseed_every=3, reseed_until=10, seed=5)
    weight = model.vqvae.quantize.embedding.weight
    for step, batch in enumerate(batches(3)):
        model.before_step(step)
        model(batch)
        model.after_passes()
    used, before = model.usage > 0, weight.detach().clone()
    assert 0 < int(used.sum()) < 64
    batch = batches(4)[3]
    latents = model.vqvae.encode(batch["image"]).latents.detach().movedim(1, -1).flatten(0, 2)
    model.before_step(3)
    model(batch)
    model.after_passes()
    assert torch.equal(weight[used], before[used])
    choice = np.random.default_rng((5, 3)).integers(len(latents), size=64)
    assert torch.allclose(weight[~used], latents[torch.from_numpy(choice)][~used], atol=1e-6)
    assert int(model.usage_before.sum()) == 3 * 4 * 64
    assert int(model.usage.sum()) == 4 * 64


def test_reseeding_depends_on_seed_and_step_and_runs_once_per_step(toy: Path) -> None:
    def codes_after(seed: int) -> Tensor:
        model = VQTokenizerModel(str(toy), reseed_every=1, reseed_until=10, seed=seed)
        given = batches(2)
        for step, batch in enumerate(given):
            model.before_step(step)
            model(batch)
            model.after_passes()
        before = model.vqvae.quantize.embedding.weight.detach().clone()
        model(given[0])  # a second micro-batch
        assert torch.equal(model.vqvae.quantize.embedding.weight, before)
        return before

    torch.manual_seed(1)
    first = codes_after(0)
    torch.manual_seed(2)
    assert torch.equal(codes_after(0), first)
    assert not torch.equal(codes_after(1), first)


def test_reseeding_stops(toy: Path) -> None:
    model = VQTokenizerModel(str(toy), reseed_every=1, reseed_until=2)
    weight = model.vqvae.quantize.embedding.weight
    moved = []
    for step, batch in enumerate(batches(4)):
        before = weight.detach().clone()
        model.before_step(step)
        model(batch)
        model.after_passes()
        moved.append(not torch.equal(weight, before))
    assert moved == [False, True, False, False]  # no use is counted before step 0


def test_resumed_run_with_reseeding_is_equal_bit_for_bit(toy: Path) -> None:
    options: dict[str, Any] = {"quantize_after": 1, "reseed_every": 3, "reseed_until": 20}
    given = batches(12)
    uninterrupted = VQTokenizerModel(str(toy), **options)
    train(uninterrupted, given)
    first = VQTokenizerModel(str(toy), **options)
    optimizer = train(first, given[:6])  # between two reseedings
    state = {name: tensor.clone() for name, tensor in first.trained_state().items()}
    assert state["usage"].any()
    assert state.keys() == uninterrupted.state_dict().keys()
    second = VQTokenizerModel(str(toy), **options)
    second.load_trained_state(state, "here")
    resumed = torch.optim.AdamW(second.parameters(), lr=1e-3)
    resumed.load_state_dict(optimizer.state_dict())
    train(second, given[6:], 6, resumed)
    for name, tensor in uninterrupted.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert uninterrupted.extra_metrics() == second.extra_metrics()


def test_training_improves_psnr() -> None:
    model = VQTokenizerModel(SIZES, quantize_after=5, reseed_every=5, reseed_until=40)
    shown = torch.stack([
        torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
        for _, image, _ in photos.captioned_photos(4, 32)
    ])  # fmt: skip
    with torch.no_grad():
        first = float(model({"image": shown})[1]["psnr"]) / 4
    train(model, [{"image": shown}] * 60)
    with torch.no_grad():
        last = float(model({"image": shown})[1]["psnr"]) / 4
    assert last > first + 4  # dB
    assert model.extra_metrics()["codes_used"] > 16


# ---------------------------------------------------------------------------------------- preview, export


def test_preview_shows_the_reconstruction(toy: Path) -> None:
    model = VQTokenizerModel(str(toy))
    _, image, caption = photos.captioned_photos(1, 32)[0]
    with torch.autocast("cpu", torch.bfloat16):  # as in the preview hook; the reconstruction stays fp32
        (shown,) = model.preview(PreviewRequest([caption], [image]))
    assert shown.label == caption
    assert shown.image.size == (64, 32)
    assert shown.image.crop((0, 0, 32, 32)).tobytes() == image.tobytes()
    vqvae = VQModel.from_pretrained(toy / "vqvae")
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        latents = vqvae.encode(pixels).latents
        decoded = vqvae.decode(vqvae.quantize(latents)[2][2], force_not_quantize=True, shape=(1, 8, 8, 12)).sample
    expected = (decoded[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_allclose(np.asarray(shown.image)[:, 32:].astype(int), expected.astype(int), atol=1)
    assert model.vqvae.training


def test_wrong_options(toy: Path) -> None:
    with pytest.raises(UserError, match="reseed_every got 0; expected at least 1"):
        VQTokenizerModel(SIZES, reseed_every=0)
    with pytest.raises(UserError, match="vqvae has no size 'codes'"):
        VQTokenizerModel({**SIZES, "codes": 3})
    model = VQTokenizerModel(SIZES)
    with pytest.raises(UserError, match="preview option 'strip' is unknown"):
        model.preview(PreviewRequest([], options={"strip": True}))
    with pytest.raises(UserError, match="sides divisible by 4"):
        model.round_trip(Image.new("RGB", (30, 32)))
    with pytest.raises(UserError, match="sides divisible by 4"):
        model.sample_transform({"image": torch.zeros(3, 30, 30)}, np.random.default_rng(0))


def test_export_loads_in_diffusers(tmp_path: Path) -> None:
    model = VQTokenizerModel(SIZES, seed=3)
    train(model, batches(2))
    folder = export_components(model, tmp_path)[0].folder
    assert folder == tmp_path / "vqvae"
    loaded = VQModel.from_pretrained(tmp_path, subfolder="vqvae")
    for name, tensor in model.vqvae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert loaded.config.lookup_from_codebook is True
