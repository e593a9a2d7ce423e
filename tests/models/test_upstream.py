"""Problems of diffusers and transformers that diffengine works around.

Each test asserts that a problem still exists. When it fails, upstream has fixed the problem, and the workaround can go.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AmusedImg2ImgPipeline, AmusedInpaintPipeline, AmusedPipeline, UVit2DModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from tests.support import models


@pytest.fixture
def pipeline(toy: Path) -> Any:
    return AmusedPipeline.from_pretrained(toy)


def test_gradient_checkpointing_of_the_unmodified_model_raises(pipeline: Any) -> None:
    """forward calls layer_(hidden_states, encoder_hidden_states=...) where layer_ takes *args only."""
    transformer: UVit2DModel = pipeline.transformer.train()
    given = (
        torch.zeros(1, 8, 8, dtype=torch.long),
        torch.zeros(1, 4, 48),
        torch.zeros(1, 40),
        torch.zeros(1, 5),
    )
    transformer(*given)
    transformer.enable_gradient_checkpointing()
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        transformer(*given)


def test_missing_tokenizer_loads_as_an_empty_one(tmp_path: Path) -> None:
    assert len(CLIPTokenizer.from_pretrained(tmp_path)) == 2


def test_img2img_at_strength_1_masks_nothing(pipeline: Any) -> None:
    """Its first timestep is index -1, the last of the schedule: the image barely changes."""
    image_to_image = AmusedImg2ImgPipeline(**pipeline.components)
    masked = []
    add_noise = image_to_image.scheduler.add_noise

    def record(latents: torch.Tensor, timestep: int, generator: Any = None) -> torch.Tensor:
        noised = add_noise(latents, timestep, generator=generator)
        masked.append(float((noised == 79).float().mean()))
        return noised

    image_to_image.scheduler.add_noise = record
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    for strength in (0.5, 1.0):
        image_to_image("a", image, strength=strength, num_inference_steps=4, generator=torch.Generator())
    assert masked[0] > 0.3
    assert masked[1] < 0.05


def test_inpainting_changes_a_shared_scheduler(pipeline: Any) -> None:
    AmusedInpaintPipeline(**pipeline.components)
    assert pipeline.scheduler.config.masking_schedule == "linear"


def test_only_transformers_keeps_half_precision_when_loading(pipeline: Any, tmp_path: Path) -> None:
    """diffengine therefore always passes float32."""
    pipeline.to(dtype=torch.float16).save_pretrained(tmp_path)
    text = CLIPTextModelWithProjection.from_pretrained(tmp_path, subfolder="text_encoder")
    assert text.dtype == torch.float16
    assert UVit2DModel.from_pretrained(tmp_path, subfolder="transformer").dtype == torch.float32
    from diffengine.models.amused import AmusedModel

    model = AmusedModel(str(tmp_path), train=["transformer", "text_encoder"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.module("vqvae").dtype == torch.float32


def test_default_end_id_makes_all_captions_equal() -> None:
    """CLIP pools at position 0 if no token has the end id. An end id of 2 means the highest id in the row."""
    tokenizer = models.make_tokenizer("toy")
    ids = tokenizer(["a cat", "a dog"], padding="max_length", return_tensors="pt").input_ids
    sizes = {**models.text_config("toy"), "eos_token_id": 49407}
    wrong = CLIPTextModelWithProjection(CLIPTextConfig(**sizes)).eval()
    right = CLIPTextModelWithProjection(CLIPTextConfig(**{**sizes, "eos_token_id": 2})).eval()
    with torch.no_grad():
        first, second = wrong(ids).text_embeds
        assert torch.equal(first, second)
        first, second = right(ids).text_embeds
        assert (first - second).abs().max() > 1e-3
