"""Trains diffusers' VQModel, so that an aMUSEd model can be made from nothing but pictures.

Legend: B batch, H W pixels, h w token grid, N = B*h*w latent vectors, V codes, D their dimension.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

import numpy as np
import torch
from diffusers import VQModel
from PIL import Image
from torch import Tensor, nn

from diffengine.errors import UserError
from diffengine.models.loading import load_component
from diffengine.models.base import Batch, Picture, PreviewRequest, TrainableModel


@final
class VQTokenizerModel(TrainableModel):
    """Reconstruction (L1 + MSE) and commitment, with re-seeding of dead codes.

    A code that no latent chose since the last re-seeding is set to an encoder output of the current batch; without
    it a small codebook collapses. Chosen on rank 0 from (seed, step) and broadcast.

    Args:
        vqvae: a folder or hub name, or `dict(...)` of VQModel's sizes to build it from nothing.
        l1_weight, mse_weight: of the mean absolute and squared error over pixels.
        commitment_weight: of the quantizer's own loss (codebook and commitment terms).
        reseed_every: steps between re-seedings; 0 for never.
        reseed_until: step after which codes are left alone, so that they settle.
        seed: of the weights built from sizes and of re-seeding, given by the run.
    """

    def __init__(
        self,
        vqvae: str | dict,
        *,
        l1_weight: float = 1.0,
        mse_weight: float = 1.0,
        commitment_weight: float = 1.0,
        reseed_every: int = 25,
        reseed_until: int = 0,
        assets: Mapping[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        del assets  # it learns none
        self.vqvae = _build(vqvae, seed)
        self.vqvae.requires_grad_(True).train()
        self.l1_weight, self.mse_weight, self.commitment_weight = l1_weight, mse_weight, commitment_weight
        self.reseed_every, self.reseed_until = reseed_every, reseed_until
        self.seed = seed
        self.codes = self.vqvae.config.num_vq_embeddings
        self.usage: Tensor
        self.register_buffer("usage", torch.zeros(self.codes))  # times each code was chosen since the last re-seeding
        self._latents_ND: Tensor | None = None

    @classmethod
    def learn_assets(cls, options: Mapping[str, Any], captions: Callable[[], Iterable[str]]) -> dict[str, str]:
        return {}

    @property
    def assets(self) -> dict[str, str]:
        return {}

    @property
    def sample_draw(self) -> None:
        return None

    def prepare(self, batch: Batch) -> Batch:
        return {"image": batch["image"].to(self.usage.device, non_blocking=True)}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Takes `image` (B,3,H,W) in [0,1]; sums over pictures."""
        pixels = batch["image"]
        latents = self.vqvae.encode(pixels).latents
        quantized, commitment, (_, _, ids) = self.vqvae.quantize(latents)
        decoded = self._decode(quantized)
        error = decoded.float() - pixels
        mse_B = error.square().mean(dim=(1, 2, 3))
        loss_B = self.l1_weight * error.abs().mean(dim=(1, 2, 3)) + self.mse_weight * mse_B
        loss = loss_B.sum() + self.commitment_weight * commitment * len(pixels)
        with torch.no_grad():
            self.usage.index_add_(0, ids.flatten(), torch.ones_like(ids.flatten(), dtype=self.usage.dtype))
            self._latents_ND = latents.detach().movedim(1, -1).flatten(0, 2).float()
            psnr = -10 * torch.log10(mse_B.clamp_min(1e-10)).sum()
        return loss, {"mse": mse_B.detach().sum(), "psnr": psnr}

    def _decode(self, quantized: Tensor) -> Tensor:
        """Quantized latents as pixels. VQModel.decode would take them for ids when lookup_from_codebook is set."""
        return self.vqvae.decoder(self.vqvae.post_quant_conv(quantized))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if not self.reseed_every or (step + 1) % self.reseed_every:
            return
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.usage)
        if step < self.reseed_until and self._latents_ND is not None:
            generator = torch.Generator().manual_seed((self.seed << 32) + step)
            choice = torch.randint(len(self._latents_ND), (self.codes,), generator=generator)
            fresh_VD = self._latents_ND[choice.to(self._latents_ND.device)]
            weight = self.vqvae.quantize.embedding.weight
            weight.copy_(torch.where((self.usage == 0)[:, None], fresh_VD, weight))
            if torch.distributed.is_initialized():
                torch.distributed.broadcast(weight.data, src=0)
        self.usage.zero_()

    def gauges(self) -> dict[str, float]:
        """Codes used, and the perplexity of their use, since the last re-seeding."""
        used = int((self.usage > 0).sum())
        if not used:
            return {}
        share = self.usage / self.usage.sum()
        perplexity = math.exp(-float(torch.xlogy(share, share).sum()))
        return {"codes_used": used, "perplexity": perplexity}

    @property
    def chance_loss(self) -> None:
        return None

    @property
    def exportable(self) -> dict[str, nn.Module]:
        return {"vqvae": self.vqvae}

    def preview(self, request: PreviewRequest) -> list[Picture]:
        """Each picture beside its round trip through the codes."""
        if request.options:
            raise UserError(f"preview option '{next(iter(request.options))}' is unknown; a VQ model takes none")
        return [
            Picture(label, beside(picture, self.round_trip(picture)))
            for label, picture in zip(request.prompts, request.pictures)
        ]

    @torch.no_grad()
    def round_trip(self, picture: Image.Image) -> Image.Image:
        """A picture through encoder, codebook and decoder; sides must be divisible by f."""
        pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1)[None] / 255
        latents = self.vqvae.encode(pixels.to(self.usage.device)).latents
        decoded = self._decode(self.vqvae.quantize(latents)[0])[0]
        return Image.fromarray((decoded.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures of one size in one."""
    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def _build(vqvae: str | Mapping[str, Any], seed: int) -> VQModel:
    if isinstance(vqvae, Mapping):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return VQModel(**{key: value for key, value in vqvae.items() if key != "type"})
    return load_component(vqvae, "vqvae", VQModel.from_pretrained, torch_dtype=torch.float32)
