"""From a host batch to what the transformer is trained on: pixels to token ids, captions to ids.

Legend: B batch, H W pixels, f pixels per token, h = H/f, w = W/f, T text length, D text width, M masked tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import final

import numpy as np
import torch
from diffusers import VQModel
from torch import Tensor
from transformers import CLIPTokenizer

from diffengine.models.base import Batch
from diffengine.models.frozen import Frozen
from diffengine.models.masking import masked_index

ENCODING = ("encoder", "quant_conv", "quantize")  # the children of a VQ model that turn pixels into ids
Lookup = Callable[[str], Mapping[str, np.ndarray] | None]


@final
class AmusedPreprocessor:
    """Tokenizes images with the frozen VQ model, and captions with the tokenizer.

    Args:
        vqvae: the frozen VQ model, in fp32 (its fp16 makes NaN).
        tokenizer: pads captions to its own maximum length, as the pipeline does.
        vq_batch_size: images encoded at once. Token ids are equal, id for id, for the same device and size.

    Attributes:
        lookup: what a cache has for a caption, arrays by name; None if it has nothing.
    """

    def __init__(self, vqvae: Frozen[VQModel], tokenizer: CLIPTokenizer, vq_batch_size: int) -> None:
        self.vqvae = vqvae
        self.tokenizer = tokenizer
        self.vq_batch_size = vq_batch_size
        self.lookup: Lookup = lambda caption: None

    def __call__(self, batch: Batch, device: torch.device) -> Batch:
        """Move a batch to the device and tokenize it.

        Args:
            batch: `image` (B,3,H,W) in [0,1], `micro_conds` (B,5), `text` [B], `masked` [B], perhaps `weight` [B]. From
                a cache, `token_ids` (B,h,w) instead of `image`.

        Returns:
            `token_ids` (B,h,w) int64, `micro_conds`, `masked_index` (M,) int64, and `text_ids` (B,T) int64 or, from a
            cache, `hidden_states` (B,T,D) and `pooled_text_emb` (B,D). With weights, also `target_weights` (M,): each
            masked token has its sample's.
        """
        if "token_ids" in batch:
            token_ids = to_device(batch["token_ids"], device).long()
        else:
            token_ids = self.encode(to_device(batch["image"], device))
        weights = {}
        if "weight" in batch:
            counts = torch.tensor([len(row) for row in batch["masked"]])
            weight_M = torch.tensor(batch["weight"]).repeat_interleave(counts)
            weights["target_weights"] = to_device(weight_M, device)
        return {
            **weights,
            "token_ids": token_ids,
            "micro_conds": to_device(batch["micro_conds"], device),
            **self._captions(batch["text"], device),
            "masked_index": to_device(masked_index(batch["masked"], token_ids[0].numel()), device),
        }

    def _captions(self, captions: list[str], device: torch.device) -> Batch:
        """What the cache has for all these captions, else their ids."""
        rows = [self.lookup(caption) for caption in captions]
        found = [row for row in rows if row is not None]
        if len(found) < len(rows):
            return {"text_ids": to_device(self.text_ids(captions), device)}
        columns = {name: torch.from_numpy(np.stack([row[name] for row in found])) for name in found[0]}
        on_device = {name: to_device(column, device) for name, column in columns.items()}
        return {name: value.long() if name == "text_ids" else value for name, value in on_device.items()}

    def text_ids(self, captions: list[str]) -> Tensor:
        """Captions as ids (B, T) int64 on the host, padded and cut as AmusedPipeline does."""
        return self.tokenizer(
            captions, return_tensors="pt", padding="max_length", truncation=True,
            max_length=self.tokenizer.model_max_length,
        ).input_ids  # fmt: skip

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B,3,H,W) in [0,1] as token ids (B,h,w) int64; in fp32, whatever autocast and TF32 are set to."""
        vqvae = self.vqvae.on(pixels.device, ENCODING)
        with torch.inference_mode(), in_fp32(pixels.device):
            chunks = pixels.float().split(self.vq_batch_size)
            ids = torch.cat([encode_chunk(vqvae, chunk) for chunk in chunks])
        return ids.clone()  # autograd refuses tensors that were made in inference mode


def encode_chunk(vqvae: VQModel, pixels: Tensor) -> Tensor:
    """One chunk's token ids, reshaped by the chunk's own size (reference scripts use the whole batch's).

    Channels-last, in which convolutions are faster. They round differently, which changes an id where two codes are
    equally near.
    """
    latents = vqvae.encode(pixels.contiguous(memory_format=torch.channels_last)).latents
    ids = vqvae.quantize(latents)[2][2]
    return ids.view(latents.shape[0], *latents.shape[2:])


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
