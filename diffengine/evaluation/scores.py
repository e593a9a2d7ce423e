"""CLIP score, FID, KID and inception score by torchmetrics, where their weights are on this machine."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from torch import Tensor, nn

from diffengine.errors import UserError
from diffengine.text import one_line

CLIP = "openai/clip-vit-base-patch16"
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"
PACKAGES = "pip install 'diffengine[eval]'"
BATCH = 32  # images that a network sees at once


@dataclass(frozen=True)
class Score:
    """A score of generated images: computed by `compute(generated, prompts, originals)`, under these names."""

    names: tuple[str, ...]
    compute: Callable[[Sequence[Image.Image], Sequence[str], Sequence[Image.Image] | None], dict[str, float]]


def available(clip: str = CLIP, device: torch.device | None = None) -> tuple[list[Score], list[str]]:
    """The scores that can be computed on this machine, and a line for each that cannot: what is missing and where.

    Args:
        clip: a hub name whose files are in the local cache, or a folder.
    """
    scores, missing = [], []
    for load in (lambda: clip_score(clip, device), lambda: inception_scores(*load_inception(), device)):
        try:
            scores.append(load())
        except UserError as error:
            missing.append(str(error))
    return scores, missing


def clip_score(name: str, device: torch.device | None = None) -> Score:
    """CLIP score (arXiv 2104.08718) in torchmetrics' scale: 100 times the cosine, at least 0; the mean over images."""
    try:
        from torchmetrics.multimodal import CLIPScore
        from transformers import CLIPModel, CLIPTokenizer
    except ImportError as error:
        raise UserError(f"no CLIP score: {PACKAGES} ({one_line(error)})") from error
    try:
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, local_files_only=True))
        model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        advice = f"download it with `hf download {name}`, or name a folder with --clip"
        raise UserError(f"no CLIP score: '{name}' is not on this machine; {advice}") from error
    settings = folder / "preprocessor_config.json"
    process = ClipInputs(tokenizer, json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {})

    def compute(generated: Sequence[Image.Image], prompts: Sequence[str], _: Any) -> dict[str, float]:
        metric = CLIPScore(lambda: (ClipFeatures(model), process)).to(device or "cpu")
        for start in range(0, len(generated), BATCH):
            chunk = slice(start, start + BATCH)
            metric.update([_uint8(image) for image in generated[chunk]], list(prompts[chunk]))
        return {"clip_score": float(metric.compute())}

    return Score(("clip_score",), compute)


class ClipFeatures(nn.Module):
    """A CLIPModel whose features are tensors, as torchmetrics expects; those of transformers 5 are outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        return self.model.config

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return _features(self.model.get_image_features(pixel_values=pixels))

    def get_text_features(self, text_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return _features(self.model.get_text_features(input_ids=text_ids, attention_mask=attention_mask))


class ClipInputs:
    """CLIP's processor, with PIL: transformers' own needs torchvision."""

    def __init__(self, tokenizer: Any, settings: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        size = settings.get("crop_size", 224)
        self.side = size["height"] if isinstance(size, dict) else size
        self.mean = torch.tensor(settings.get("image_mean", [0.48145466, 0.4578275, 0.40821073]))[:, None, None]
        self.std = torch.tensor(settings.get("image_std", [0.26862954, 0.26130258, 0.27577711]))[:, None, None]

    def __call__(self, images: list[Tensor] | None = None, text: list[str] | None = None, **_: Any) -> dict[str, Any]:
        if images is None:
            length = self.tokenizer.model_max_length
            return self.tokenizer(text, return_tensors="pt", padding=True, truncation=True, max_length=length)
        squares = []
        for image in images:
            pil = Image.fromarray(image.permute(1, 2, 0).byte().cpu().numpy())
            square = _uint8(ImageOps.fit(pil, (self.side, self.side), Image.Resampling.BICUBIC))
            squares.append((square / 255 - self.mean) / self.std)
        return {"pixel_values": torch.stack(squares)}


def load_inception() -> tuple[nn.Module, nn.Module]:
    """The Inception network of FID, with its 2,048 features and with its logits."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    try:
        import torch_fidelity  # noqa: F401
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        raise UserError(f"no FID, KID or inception score: {PACKAGES} ({one_line(error)})") from error
    if not file.exists():
        raise UserError(f"no FID, KID or inception score: put {INCEPTION_URL} into {file.parent}")
    features, logits = (
        NoTrainInceptionV3("inception-v3-compat", [name], str(file)) for name in ("2048", "logits_unbiased")
    )
    features.num_features = 2048
    return features, logits


def inception_scores(features: nn.Module, logits: nn.Module, device: torch.device | None = None) -> Score:
    """FID, KID and inception score from networks that turn uint8 images (B,3,H,W) into features and logits."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    def compute(
        generated: Sequence[Image.Image], _: Sequence[str], originals: Sequence[Image.Image] | None
    ) -> dict[str, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it keeps all features in memory
            inception = InceptionScore(logits, splits=min(10, len(generated))).to(device or "cpu")
            metrics: list[Any] = [inception]
            if originals:
                count = min(len(generated), len(originals))
                subset = max(1, min(1000, count - 1))
                fid, kid = FrechetInceptionDistance(features), KernelInceptionDistance(features, subset_size=subset)
                metrics += [fid.to(device or "cpu"), kid.to(device or "cpu")]
                for metric in metrics[1:]:
                    _update(metric, originals, real=True)
                    _update(metric, generated, real=False)
        _update(inception, generated)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # KID draws subsets, the inception score splits
            found = {"inception_score": float(inception.compute()[0])}
            if originals:
                found |= {"fid": float(fid.compute()), "kid": float(kid.compute()[0])}
        return found

    return Score(("fid", "kid", "inception_score"), compute)


def _update(metric: Any, images: Sequence[Image.Image], **options: Any) -> None:
    for start in range(0, len(images), BATCH):
        batch = torch.stack([_uint8(image) for image in images[start : start + BATCH]])
        metric.update(batch.to(metric.device), **options)


def _uint8(image: Image.Image) -> Tensor:
    """(3,H,W)."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)


def _features(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output
