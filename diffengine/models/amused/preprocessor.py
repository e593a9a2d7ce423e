"""From a host batch to what the transformer is trained on: pixels to token ids, captions to ids.

Legend: B batch, H W pixels, f pixels per token, h = H/f, w = W/f, T text length, D text width, M masked tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from diffusers import VQModel
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from diffengine.models.base import Batch
from diffengine.models.frozen import Frozen
from diffengine.models.masking import masked_index

ENCODING = ("encoder", "quant_conv", "quantize")  # the children of a VQ model that turn pixels into ids
Lookup = Callable[[str], Mapping[str, np.ndarray] | None]


@final
@dataclass
class AmusedPreprocessor:
    """Tokenizes images with the frozen VQ model, and captions with the tokenizer."""

    vqvae: Frozen[VQModel]  # runs in fp32, since its fp16 makes NaN
    tokenizer: CLIPTokenizer
    vq_batch_size: int  # images encoded at once; for the same device and size, token ids are equal, id for id
    lookup: Lookup | None = None  # what a cache has for a caption: arrays by name, or None

    def __call__(self, batch: Batch, device: torch.device) -> Batch:
        """Move a batch to the device and tokenize it.

        Args:
            batch: `image` (B,3,H,W) in [0,1] or, from a cache, `token_ids` (B,h,w); `micro_conds` (B,5), `text` [B],
                `masked` [B], perhaps `weight` [B], `bucket` [B] and `source`, [B] of (S,) one-hot.

        Returns:
            `token_ids` (B,h,w) int64, `micro_conds`, `masked_index` (M,) int64, and `text_ids` (B,T) int64 or, from a
            cache, `hidden_states` (B,T,D) and `pooled_text_emb` (B,D). With weights, `target_weights` (M,) too; with
            buckets, `bucket` (B,) int64; with sources, `source` (B,S) float32.
        """
        if "token_ids" in batch:
            token_ids = to_device(batch["token_ids"], device).long()
        else:
            token_ids = self.encode(to_device(batch["image"], device))
        optional = {}
        if "bucket" in batch:
            optional["bucket"] = to_device(torch.tensor(batch["bucket"]), device)
        if "source" in batch:
            optional["source"] = to_device(torch.from_numpy(np.stack(batch["source"])), device)
        if "weight" in batch:
            counts = torch.tensor([len(row) for row in batch["masked"]])
            weight_M = torch.tensor(batch["weight"]).repeat_interleave(counts)
            optional["target_weights"] = to_device(weight_M, device)
        return {
            **optional,
            "token_ids": token_ids,
            "micro_conds": to_device(batch["micro_conds"], device),
            **self._captions(batch["text"], device),
            "masked_index": to_device(masked_index(batch["masked"], token_ids[0].numel()), device),
        }

    def _captions(self, captions: list[str], device: torch.device) -> Batch:
        """What the cache has for these captions or, if it lacks one, their ids."""
        rows = [self.lookup(caption) for caption in captions] if self.lookup else []
        found = [row for row in rows if row is not None]
        if len(found) < len(captions):
            return {"text_ids": to_device(self.text_ids(captions), device)}
        columns = {name: torch.from_numpy(np.stack([row[name] for row in found])) for name in found[0]}
        tensors = {name: to_device(column, device) for name, column in columns.items()}
        return {name: tensor.long() if name == "text_ids" else tensor for name, tensor in tensors.items()}

    def text_ids(self, captions: list[str]) -> Tensor:
        """Captions as ids (B,T) int64 on the host, padded and cut as AmusedPipeline does."""
        return caption_ids(self.tokenizer, captions)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B,3,H,W) in [0,1] as token ids (B,h,w) int64; in fp32, whatever autocast and TF32 are set to."""
        vqvae = self.vqvae.on(pixels.device, ENCODING)
        chunks = []
        with torch.inference_mode(), in_fp32(pixels.device):
            for chunk in pixels.float().split(self.vq_batch_size):
                # Channels-last is faster. It rounds differently, so an id may change if two codes are equally near.
                chunks.append(vq_ids(vqvae, chunk.contiguous(memory_format=torch.channels_last)))
        return torch.cat(chunks)  # here, since autograd refuses tensors that were made in inference mode


def vq_ids(vqvae: VQModel, pixels: Tensor) -> Tensor:
    """Pixels (B,3,H,W) in [0,1] as token ids (B,h,w) int64."""
    latents = vqvae.encode(pixels).latents
    return vqvae.quantize(latents)[2][2].view(len(latents), *latents.shape[2:])


def caption_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions as ids (B,T) int64 on the host, padded and cut as AmusedPipeline does."""
    options = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    return tokenizer(captions, return_tensors="pt", **options).input_ids


def encode_ids(text_encoder: CLIPTextModelWithProjection, text_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What AmusedPipeline takes of the text encoder: `hidden_states[-2]` (B,T,D) and `text_embeds` (B,D)."""
    output = text_encoder(text_ids, output_hidden_states=True, return_dict=True)
    return output.hidden_states[-2], output.text_embeds


@contextmanager
def in_fp32(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32 inside; the settings are restored."""
    backends = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, allowed in zip(backends, before):
            backend.allow_tf32 = allowed


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; to a GPU through pinned memory, so the host does not wait."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
