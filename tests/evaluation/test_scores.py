"""CLIP score, FID, KID and inception score, with small networks; and what is printed where weights are missing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from diffengine.errors import UserError
from diffengine.evaluation import scores
from tests.support import models
from tests.support.photos import captioned_photos

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP in the layout of a released one."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = models.make_tokenizer("toy")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length, eos_token_id=2, **sizes
    )
    config = CLIPConfig(
        text_config=text.to_dict(),
        vision_config=CLIPVisionConfig(image_size=32, patch_size=8, **sizes).to_dict(),
        projection_dim=12,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"crop_size": {"height": 32, "width": 32}, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [image for _, image, _ in captioned_photos(9, 32)]


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return [caption for _, _, caption in captioned_photos(9, 32)]


def test_clip_score_is_the_mean_cosine(clip: Path, images: list, captions: list, monkeypatch) -> None:
    monkeypatch.setattr(scores, "BATCH", 4)  # the last batch is smaller
    found = scores.clip_score(str(clip)).compute(images, captions, None)
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), models.make_tokenizer("toy")
    cosines = []
    for image, caption in zip(images, captions):
        pixels = (torch.from_numpy(np.asarray(image).copy()) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        ids = tokenizer([caption], return_tensors="pt", truncation=True, max_length=tokenizer.model_max_length)
        with torch.no_grad():
            output = model(pixel_values=pixels.permute(2, 0, 1)[None], **ids)
        cosines.append(float(nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)))
    assert found == {"clip_score": pytest.approx(100 * np.mean(cosines), abs=1e-3)}
    assert np.ptp(cosines) > 0.01


class Channels(nn.Module):
    """Features of a uint8 image: the means of its channels in four quarters."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1)


class Logits(Channels):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)[:, :5] / 20


def test_fid_and_inception_score_equal_their_formulas(images: list) -> None:
    many = [image for _, image, _ in captioned_photos(60, 32)]
    generated, originals = many[:30], many[30:]
    score = scores.inception_scores(Channels(), Logits())
    found = score.compute(generated, [""] * 30, originals)
    assert set(found) == {*score.names} == {"fid", "kid", "inception_score"}
    features = [
        Channels()(
            torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in group])
        ).numpy()
        for group in (originals, generated)
    ]
    (real_mean, real), (fake_mean, fake) = ((values.mean(axis=0), np.cov(values, rowvar=False)) for values in features)
    eigenvalues = np.linalg.eigvals(real @ fake)
    expected = (
        ((real_mean - fake_mean) ** 2).sum() + np.trace(real + fake) - 2 * np.sqrt(eigenvalues.clip(0)).sum().real
    )
    assert found["fid"] == pytest.approx(expected, rel=1e-3)
    again = score.compute(generated, [""] * 30, originals)
    assert again == found  # KID's subsets and the splits are those of a fixed seed
    assert score.compute(originals, [""] * 30, originals)["fid"] == pytest.approx(0, abs=1e-2)
    assert found["inception_score"] > 1


def test_scores_without_originals(images: list) -> None:
    score = scores.inception_scores(Channels(), Logits())
    assert set(score.compute(images, [""] * 9, None)) == {"inception_score"}


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    found, missing = scores.available("no-one/no-clip")
    assert found == []
    assert missing[0].startswith(
        "no CLIP score: 'no-one/no-clip' is not on this machine; download it with `hf download"
    )
    assert missing[1].startswith("no FID, KID or inception score: ")
    with pytest.raises(UserError, match=r"pip install 'diffengine\[eval\]'|put https://.*weights-inception.*pth into"):
        scores.load_inception()
    assert all("\n" not in line for line in missing)


def test_what_is_there_is_found(clip: Path) -> None:
    found, missing = scores.available(str(clip))
    assert [score.names for score in found] == [("clip_score",)]
    assert len(missing) == 1
