"""Trains diffusers' VQModel, so that an aMUSEd model can be made from images alone.

Legend: B batch, H W pixels, h w token grid, N = B*h*w latent vectors, V codes, D their dimension.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from diffusers import VQModel
from PIL import Image
from torch import Tensor, nn

from diffengine.errors import UserError, require
from diffengine.models.base import Batch, LabelledImage, PreviewRequest, TrainableModel
from diffengine.models.frozen import evaluating
from diffengine.models.loading import component_folder, load_module, seeded, unknown_sizes
from diffengine.models.masking import TokenGrid
from diffengine.signatures import sizes_out_of_range


@final
class VQTokenizerModel(TrainableModel):
    """Reconstruction (L1 + MSE) through a codebook, with re-seeding of dead codes.

    A code that no latent chose since the last re-seeding is set to a latent of the current batch; without it a small
    codebook collapses. Rank 0 decides, from (seed, step), and broadcasts.

    Args:
        vqvae: a folder or hub name, or `dict(...)` of VQModel's sizes to build it from scratch.
        l1_weight, mse_weight: of the mean absolute and squared error over pixels.
        codebook_weight, commitment_weight: of the squared distance that moves codes to latents, and latents to codes.
        quantize_after: steps of a plain autoencoder, before the codebook is filled with latents and used.
        reseed_every: steps over which the use of codes is counted, and between re-seedings.
        reseed_until: step from which on codes are no longer re-seeded, so that they settle; 0: never re-seeded.
        assets, seed: given by the run; assets are ignored, the seed is of re-seeding and of weights from scratch.

    Raises:
        UserError: an option is out of range, or the VQ model cannot be loaded.
    """

    def __init__(
        self, vqvae: str | dict, *, l1_weight: float = 1.0, mse_weight: float = 1.0,
        codebook_weight: float = 1.0, commitment_weight: float = 0.25,
        quantize_after: int = 0, reseed_every: int = 25, reseed_until: int = 0,
        assets: Mapping[str, str] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        require(reseed_every >= 1, f"model.reseed_every got {reseed_every}; expected at least 1")
        self._origin = vqvae
        self.vqvae = _build(vqvae, seed).requires_grad_(True).train()
        self.l1_weight, self.mse_weight = l1_weight, mse_weight
        self.codebook_weight, self.commitment_weight = codebook_weight, commitment_weight
        self.quantize_after, self.reseed_every, self.reseed_until = quantize_after, reseed_every, reseed_until
        self.seed = seed
        self.codes: int = self.vqvae.config.num_vq_embeddings
        self.usage = nn.Buffer(torch.zeros(self.codes))  # times chosen, on all ranks, in this window
        self.usage_before = nn.Buffer(torch.zeros(self.codes))  # and in the window before
        self._step, self._window_begins = 0, False
        self._chosen_V = torch.zeros(self.codes)  # times chosen in this step, on this rank
        self.size_multiple = self.sample_transform.factor

    @property
    def sample_transform(self) -> TokenGrid:
        return TokenGrid(2 ** (len(self.vqvae.config.block_out_channels) - 1))

    def prepare(self, batch: Batch) -> Batch:
        require("weight" not in batch, "a VQ model takes no weights of samples; train it on the images alone")
        prepared = {"image": batch["image"].to(self.usage.device, non_blocking=True)}
        if "source" in batch:
            prepared["source"] = torch.from_numpy(np.stack(batch["source"])).to(self.usage.device, non_blocking=True)
        return prepared

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Takes `image` (B,3,H,W) in [0,1], perhaps `source` (B,S) one-hot; sums over images."""
        pixels = batch["image"]
        latents = self.vqvae.encode(pixels).latents.float()
        if self._step < self.quantize_after:
            # Codes get a gradient of zero: DDP waits for every trained parameter.
            distance_B = (0 * self.vqvae.quantize.embedding.weight).sum().expand(len(latents))
            decoded = _decode(self.vqvae, latents)
        else:
            decoded, distance_B = self._through_codes(latents)
        error = decoded.float() - pixels
        mse_B = error.square().mean(dim=(1, 2, 3))
        loss_B = self.l1_weight * error.abs().mean(dim=(1, 2, 3)) + self.mse_weight * mse_B + distance_B
        psnr_B = -10 * torch.log10(mse_B.detach().clamp_min(1e-10))
        logs = {"mse": mse_B.detach().sum(), "psnr": psnr_B.sum()}
        if "source" in batch:
            logs["loss_by_source"] = (loss_B.detach()[:, None] * batch["source"]).sum(dim=0)
        return loss_B.sum(), logs

    def _through_codes(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels decoded from the nearest codes, and each image's weighted distance to them (B,)."""
        with torch.autocast(latents.device.type, enabled=False):
            if self._window_begins:
                self._begin_window(latents.detach().movedim(1, -1).flatten(0, 2))
            quantized, _, (_, _, ids_N) = self.vqvae.quantize(latents)
            codes = self.vqvae.quantize.get_codebook_entry(ids_N, latents.movedim(1, -1).shape)
            moves_codes_B = (codes - latents.detach()).square().mean(dim=(1, 2, 3))
            moves_latents_B = (codes.detach() - latents).square().mean(dim=(1, 2, 3))
        self._chosen_V.index_add_(0, ids_N, torch.ones_like(ids_N, dtype=torch.float))
        distance_B = self.codebook_weight * moves_codes_B + self.commitment_weight * moves_latents_B
        return _decode(self.vqvae, quantized), distance_B

    def before_step(self, step: int) -> None:
        self._step = step
        self._chosen_V = torch.zeros_like(self.usage)
        self._window_begins = (step - self.quantize_after) % self.reseed_every == 0

    def after_passes(self) -> None:
        """Counted on all ranks, so that a checkpoint of rank 0 has the use of all."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._chosen_V)
        self.usage += self._chosen_V

    @torch.no_grad()
    def _begin_window(self, latents_ND: Tensor) -> None:
        """Re-seed dead codes if it is time, and start to count again; in a step's first micro-batch."""
        self._window_begins = False
        since = self._step - self.quantize_after
        if (since > 0 and self._step < self.reseed_until) or (since == 0 and self.quantize_after > 0):
            choice = np.random.default_rng((self.seed, self._step)).integers(len(latents_ND), size=self.codes)
            fresh_VD = latents_ND[torch.from_numpy(choice).to(latents_ND.device)]
            weight = self.vqvae.quantize.embedding.weight
            replaced = (self.usage == 0) & fresh_VD.isfinite().all(dim=1)
            weight.copy_(torch.where(replaced[:, None], fresh_VD, weight))
            if torch.distributed.is_initialized():
                torch.distributed.broadcast(weight.data, src=0)
        self.usage_before.copy_(self.usage)
        self.usage.zero_()

    def extra_metrics(self) -> dict[str, float]:
        """Codes used, and the perplexity of their use, in this window and the one before."""
        counts = self.usage + self.usage_before
        used = int((counts > 0).sum())
        if not used:
            return {}
        share = counts / counts.sum()
        return {"codes_used": used, "perplexity": math.exp(-float(torch.xlogy(share, share).sum()))}

    @property
    def sources(self) -> dict[str, Path]:
        folder = component_folder(self._origin, "vqvae") if isinstance(self._origin, str) else None
        return {"vqvae": folder} if folder else {}

    def base(self, name: str) -> nn.Module:
        return _build(self._origin, self.seed)

    def probe(self, name: str, module: Any) -> Tensor:
        """The round trip of an image of noise."""
        side = 4 * self.sample_transform.factor
        pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        with evaluating(module):
            return _round_trip(module, pixels)

    def preview(self, request: PreviewRequest) -> list[LabelledImage]:
        """Each image and, to its right, its round trip through the codes."""
        if request.options:
            raise UserError(f"preview option '{next(iter(request.options))}' is unknown; a VQ model takes none")
        rows = []
        for label, image in zip(request.prompts, request.images):
            sides = [np.asarray(side) for side in (image.convert("RGB"), self.round_trip(image))]
            rows.append(LabelledImage(label, Image.fromarray(np.hstack(sides))))
        return rows

    @torch.no_grad()
    def round_trip(self, image: Image.Image) -> Image.Image:
        """An image through encoder, codebook and decoder, in fp32; its sides must be divisible by f."""
        pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None] / 255
        self.sample_transform.sides(*pixels.shape[-2:])
        with torch.autocast(self.usage.device.type, enabled=False):
            decoded = _round_trip(self.vqvae, pixels.to(self.usage.device))[0]
        return Image.fromarray((decoded.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def _build(vqvae: str | Mapping[str, Any], seed: int) -> VQModel:
    """Loaded, or built as AmusedPipeline needs it: with `lookup_from_codebook`."""
    if isinstance(vqvae, str):
        return load_module(vqvae, "vqvae", VQModel)
    sizes = {key: value for key, value in vqvae.items() if key != "type"}
    problems = unknown_sizes("vqvae", sizes, VQModel) + sizes_out_of_range("vqvae", sizes)
    require(not problems, "model: " + "; ".join(problems))
    with seeded(seed):
        return VQModel(**{"lookup_from_codebook": True, **sizes})


def _round_trip(vqvae: VQModel, pixels: Tensor) -> Tensor:
    return _decode(vqvae, vqvae.quantize(vqvae.encode(pixels).latents)[0])


def _decode(vqvae: VQModel, quantized: Tensor) -> Tensor:
    """Quantized latents as pixels; VQModel.decode takes them for ids if `lookup_from_codebook` is set."""
    return vqvae.decoder(vqvae.post_quant_conv(quantized))
