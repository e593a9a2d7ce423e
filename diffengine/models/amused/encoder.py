"""What a cache can keep for aMUSEd: token ids, caption ids, a frozen text encoder's outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from diffengine.models.amused.preprocessor import ENCODING, AmusedPreprocessor, Lookup, to_device
from diffengine.models.base import Encoder
from diffengine.models.frozen import Frozen
from diffengine.models.loading import digest


@final
@dataclass
class AmusedEncoder(Encoder):
    """Encodes as the preprocessor and the model do, on the model's device."""

    preprocessor: AmusedPreprocessor
    text_encoder: Frozen[CLIPTextModelWithProjection] | None  # None if it is trained
    text_config: CLIPTextConfig
    encode_text: Callable[[Tensor], tuple[Tensor, Tensor]]  # the model's
    device: torch.device

    def __post_init__(self) -> None:
        self.batch_size = self.preprocessor.vq_batch_size

    def image_key(self) -> dict[str, str]:
        vqvae = self.preprocessor.vqvae.on(self.device, ENCODING)
        return {"VQ model": digest(nn.ModuleList(getattr(vqvae, name) for name in ENCODING), vqvae.config)}

    def encode_images(self, images: Tensor) -> dict[str, Tensor]:
        ids = self.preprocessor.encode(to_device(images, self.device)).cpu()
        codes = self.preprocessor.vqvae.on(self.device, ENCODING).config.num_vq_embeddings
        return {"token_ids": smallest_integers(ids, codes)}

    def caption_key(self, embeddings: bool) -> dict[str, str]:
        tokenizer = self.preprocessor.tokenizer
        rules = {"file": tokenizer.backend_tokenizer.to_str(), "length": tokenizer.model_max_length}
        key = {"tokenizer": digest(None, {**rules, "pad": tokenizer.pad_token_id})}
        if embeddings:
            assert self.text_encoder is not None
            key["text encoder"] = digest(self.text_encoder.on(self.device), self.text_config.to_dict())
        return key

    def encode_captions(self, captions: list[str], embeddings: bool) -> dict[str, Tensor]:
        text_ids = self.preprocessor.text_ids(captions)
        if not embeddings:
            return {"text_ids": smallest_integers(text_ids, len(self.preprocessor.tokenizer))}
        with torch.no_grad():
            hidden_BTD, pooled_BD = self.encode_text(to_device(text_ids, self.device))
        return {"hidden_states": hidden_BTD.float().cpu(), "pooled_text_emb": pooled_BD.float().cpu()}

    @property
    def embedding_bytes(self) -> int | None:
        if self.text_encoder is None:
            return None
        length, sizes = self.preprocessor.tokenizer.model_max_length, self.text_config
        return 4 * (length * sizes.hidden_size + sizes.projection_dim)

    def to_host(self) -> None:
        for frozen in (self.preprocessor.vqvae, self.text_encoder):
            if frozen is not None:
                frozen.move_back({})

    def use_captions(self, lookup: Lookup) -> None:
        self.preprocessor.lookup = lookup


def smallest_integers(ids: Tensor, limit: int) -> Tensor:
    """Ids below `limit` in the smallest of uint8, int16 and int32 that holds them."""
    dtypes = (torch.uint8, torch.int16, torch.int32)
    return ids.to(next(dtype for dtype in dtypes if torch.iinfo(dtype).max >= limit - 1))
