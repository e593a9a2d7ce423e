"""Previews: images that a model generates during training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AmusedInpaintPipeline, AmusedPipeline
from PIL import Image

from diffengine.errors import UserError
from diffengine.models.amused import AmusedModel
from diffengine.models.base import PreviewRequest
from tests.support.models import pipeline_image

OPTIONS = {"num_inference_steps": 4, "guidance_scale": 3.0}


def same(left: Image.Image, right: Image.Image) -> bool:
    return left.size == right.size and left.tobytes() == right.tobytes()


def test_preview_equals_the_pipeline(toy: Path, model: AmusedModel) -> None:
    (shown,) = model.preview(PreviewRequest(["yoda pokemon"], seed=7, options=OPTIONS))
    pipeline = AmusedPipeline.from_pretrained(toy)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline("yoda pokemon", generator=torch.Generator().manual_seed(7), **OPTIONS).images[0]
    assert shown.label == "yoda pokemon"
    assert shown.image.size == (32, 32)
    assert same(shown.image, expected)


def test_image_depends_only_on_its_prompt_and_seed(model: AmusedModel) -> None:
    first = model.preview(PreviewRequest(["a", "b", "c"], seed=3, options=OPTIONS))
    again = model.preview(PreviewRequest(["a", "b", "c"], seed=3, options=OPTIONS))
    alone = model.preview(PreviewRequest(["b"], seed=4, options=OPTIONS))
    assert all(same(left.image, right.image) for left, right in zip(first, again))
    assert same(first[1].image, alone[0].image)
    assert not same(first[0].image, model.preview(PreviewRequest(["a"], seed=5, options=OPTIONS))[0].image)


def test_preview_changes_no_state(toy: Path) -> None:
    model = AmusedModel(str(toy), train=["transformer", "text_encoder"]).train()
    model.transformer.down_block.eval()  # differs from the rest, and must be restored
    modes = {name: module.training for name, module in model.named_modules()}
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    model.preview(PreviewRequest(["a"], options={**OPTIONS, "strip": True}))
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_modes_are_restored_after_an_error(toy: Path) -> None:
    model = AmusedModel(str(toy)).train()
    with pytest.raises(UserError, match="sides divisible by 8"):
        model.preview(PreviewRequest(["a"], sizes=[(36, 36)], options=OPTIONS))
    assert model.transformer.training


def test_strip_shows_every_step(model: AmusedModel) -> None:
    images = model.preview(PreviewRequest(["a"], options={**OPTIONS, "num_inference_steps": 12, "strip": True}))
    assert [image.label for image in images] == ["a", *[f"step {step}" for step in range(1, 13)]]
    grey = [float((np.asarray(image.image) == 128).all(axis=-1).mean()) for image in images[1:]]
    expected = [max(1, int(64 * np.cos(np.pi / 2 * step / 12))) / 64 for step in range(1, 12)]
    for shown, masked in zip(grey, expected):
        assert shown == pytest.approx(masked, abs=0.03)  # a generated pixel may happen to be grey
    assert grey[0] > 0.95
    assert same(images[0].image, images[-1].image)


def test_one_image_is_decoded_at_a_time(model: AmusedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    vqvae, sizes = model.module("vqvae"), []
    decode = type(vqvae).decode

    def record(self: Any, h: torch.Tensor, **options: Any) -> Any:
        sizes.append(len(h))
        return decode(self, h, **options)

    monkeypatch.setattr(type(vqvae), "decode", record)
    model.preview(PreviewRequest(["a", "b", "c"], options=OPTIONS))
    assert sizes == [1, 1, 1]


def test_decoder_stays_fp32_in_autocast(model: AmusedModel) -> None:
    """In fp16 the released decoder outputs NaN."""
    dtypes = []
    handle = model.module("vqvae").decoder.conv_in.register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
    try:
        with torch.autocast("cpu", torch.bfloat16):
            model.preview(PreviewRequest(["a"], options=OPTIONS))
    finally:
        handle.remove()
    assert dtypes == [torch.float32]


def test_another_resolution(model: AmusedModel) -> None:
    (shown,) = model.preview(PreviewRequest(["a"], sizes=[(64, 64)], options=OPTIONS))
    assert shown.image.size == (64, 64)


def test_unknown_option(model: AmusedModel) -> None:
    with pytest.raises(UserError, match=r"preview option 'guidance' is unknown; expected one of guidance_scale, num"):
        model.preview(PreviewRequest(["a"], options={"guidance": 3}))


def test_no_prompts_no_images(model: AmusedModel) -> None:
    assert model.preview(PreviewRequest([], options={"strip": True})) == []


def test_pipeline_shares_the_live_modules(model: AmusedModel) -> None:
    pipeline = model.build_pipeline()
    assert pipeline.transformer is model.transformer
    assert pipeline.vqvae is model.module("vqvae")
    assert pipeline.text_encoder is model.module("text_encoder")


def test_inpainting_does_not_change_previews(model: AmusedModel) -> None:
    """AmusedInpaintPipeline changes the schedule of its scheduler to linear, so each pipeline gets a new scheduler."""
    pipeline = model.build_pipeline()
    before = pipeline_image(pipeline, "a", 0, **OPTIONS)
    AmusedInpaintPipeline(**pipeline.components)
    assert pipeline.scheduler.config.masking_schedule == "linear"  # changed by AmusedInpaintPipeline
    fresh = model.build_pipeline()
    assert fresh.scheduler.config.masking_schedule == "cosine"
    assert model.components.scheduler.config.masking_schedule == "cosine"
    assert same(pipeline_image(fresh, "a", 0, **OPTIONS), before)
