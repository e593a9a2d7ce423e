"""What a cache can keep for aMUSEd: token ids, caption ids, a frozen text encoder's outputs."""

from collections.abc import Callable
from typing import final

import torch
from diffusers import VQModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from diffengine.models.amused.preprocessor import ENCODING, AmusedPreprocessor, Lookup, to_device
from diffengine.models.base import Encoder
from diffengine.models.frozen import Frozen
from diffengine.models.loading import digest


@final
class AmusedEncoder(Encoder):
    """Encodes as the preprocessor and the model do.

    Args:
        preprocessor: whose work is done ahead.
        vqvae: its frozen VQ model.
        text_encoder: the frozen text encoder; None if it is trained.
        text_config: its sizes.
        encode_text: caption ids (B,T) on the device -> `hidden_states` (B,T,D) and `pooled_text_emb` (B,D).
        device: the model's.
    """

    def __init__(
        self,
        preprocessor: AmusedPreprocessor,
        vqvae: Frozen[VQModel],
        text_encoder: Frozen[CLIPTextModelWithProjection] | None,
        text_config: CLIPTextConfig,
        encode_text: Callable[[Tensor], tuple[Tensor, Tensor]],
        device: torch.device,
    ) -> None:
        self.batch_size = preprocessor.vq_batch_size
        self._preprocessor = preprocessor
        self._vqvae = vqvae
        self._text_encoder = text_encoder
        self._text_config = text_config
        self._encode_text = encode_text
        self._device = device

    def image_key(self) -> dict[str, str]:
        vqvae = self._vqvae.on(self._device, ENCODING)
        return {"VQ model": digest(nn.ModuleList(getattr(vqvae, name) for name in ENCODING), vqvae.config)}

    def encode_images(self, images: Tensor) -> dict[str, Tensor]:
        ids = self._preprocessor.encode(to_device(images, self._device)).cpu()
        codes = self._vqvae.on(self._device, ENCODING).config.num_vq_embeddings
        return {"token_ids": smallest_integers(ids, codes)}

    def caption_key(self, embeddings: bool) -> dict[str, str]:
        ids = self._preprocessor.tokenizer
        rules = {"file": ids.backend_tokenizer.to_str(), "length": ids.model_max_length, "pad": ids.pad_token_id}
        key = {"tokenizer": digest(None, rules)}
        if embeddings:
            assert self._text_encoder is not None
            key["text encoder"] = digest(self._text_encoder.on(self._device), self._text_config.to_dict())
        return key

    def encode_captions(self, captions: list[str], embeddings: bool) -> dict[str, Tensor]:
        text_ids = self._preprocessor.text_ids(captions)
        if not embeddings:
            return {"text_ids": smallest_integers(text_ids, len(self._preprocessor.tokenizer))}
        with torch.no_grad():
            hidden_BTD, pooled_BD = self._encode_text(to_device(text_ids, self._device))
        return {"hidden_states": hidden_BTD.float().cpu(), "pooled_text_emb": pooled_BD.float().cpu()}

    @property
    def embedding_bytes(self) -> int | None:
        if self._text_encoder is None:
            return None
        length, sizes = self._preprocessor.tokenizer.model_max_length, self._text_config
        return 4 * (length * sizes.hidden_size + sizes.projection_dim)

    def to_host(self) -> None:
        for frozen in (self._vqvae, self._text_encoder):
            if frozen is not None:
                frozen.move_back({})

    def use_captions(self, lookup: Lookup) -> None:
        self._preprocessor.lookup = lookup


def smallest_integers(ids: Tensor, limit: int) -> Tensor:
    """Ids below `limit` in the smallest of uint8, int16 and int32 that holds them all."""
    dtypes = (torch.uint8, torch.int16, torch.int32)
    return ids.to(next(dtype for dtype in dtypes if torch.iinfo(dtype).max >= limit - 1))
