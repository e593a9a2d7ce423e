"""From a host batch to what the transformer is trained on: pixels to token ids, captions to ids.

Legend: B batch, H W pixels, f pixels per token, h = H/f, w = W/f, T text length, M masked tokens.
"""

from typing import final

import torch
from diffusers import VQModel
from torch import Tensor
from transformers import CLIPTokenizer

from diffengine.models.base import Batch, Frozen
from diffengine.models.masking import masked_index


@final
class AmusedPreprocessor:
    """Tokenises pictures with the frozen VQ model and captions with the tokenizer.

    Args:
        vqvae: the frozen VQ model, in fp32 (its fp16 makes NaN).
        tokenizer: pads captions to its own maximum length, as the pipeline does.
        vq_batch_size: pictures encoded at once. Token ids are equal, id for id, for the same device and size.
    """

    def __init__(self, vqvae: Frozen[VQModel], tokenizer: CLIPTokenizer, vq_batch_size: int) -> None:
        self.vqvae = vqvae
        self.tokenizer = tokenizer
        self.vq_batch_size = vq_batch_size

    def __call__(self, batch: Batch, device: torch.device) -> Batch:
        """Moves `batch` to the device and adds its tokens.

        Takes `image` (B,3,H,W) in [0,1], `micro_conds` (B,5), `text` [B], `masked`, and perhaps `weight` [B];
        gives `token_ids` (B,h,w) int64, `text_ids` (B,T) int64, `micro_conds`, `masked_index` (M,) int64, and
        where there are weights `target_weights` (M,): each masked token has its sample's.
        """
        if "token_ids" in batch:
            token_ids = to_device(batch["token_ids"], device).long()
        else:
            token_ids = self.encode(to_device(batch["image"], device))
        weights = {}
        if "weight" in batch:
            counts = torch.tensor([len(row) for row in batch["masked"]])
            each = torch.tensor(batch["weight"]).repeat_interleave(counts)
            weights["target_weights"] = to_device(each, device)
        return {
            **weights,
            "token_ids": token_ids,
            "micro_conds": to_device(batch["micro_conds"], device),
            "text_ids": to_device(self.text_ids(batch["text"]), device),
            "masked_index": to_device(masked_index(batch["masked"], token_ids[0].numel()), device),
        }

    def text_ids(self, captions: list[str]) -> Tensor:
        """Captions as ids (B, T) int64 on the host, padded and cut as AmusedPipeline does."""
        return self.tokenizer(
            captions, return_tensors="pt", padding="max_length", truncation=True,
            max_length=self.tokenizer.model_max_length,
        ).input_ids  # fmt: skip

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B,3,H,W) in [0,1] as token ids (B,h,w) int64; fp32 whatever the autocast around it."""
        vqvae = self.vqvae.on(pixels.device)
        with torch.autocast(pixels.device.type, enabled=False):
            chunks = pixels.float().split(self.vq_batch_size)
            return torch.cat([encode_chunk(vqvae, chunk) for chunk in chunks])


def encode_chunk(vqvae: VQModel, pixels: Tensor) -> Tensor:
    """One chunk's token ids, reshaped by the chunk's own size (reference scripts use the whole batch's)."""
    latents = vqvae.encode(pixels).latents
    ids = vqvae.quantize(latents)[2][2]
    return ids.view(latents.shape[0], *latents.shape[2:])


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; to a GPU through pinned memory, so that the host does not wait."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
