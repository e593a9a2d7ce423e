"""Running a U-ViT in two steps, so that the token head computes only the logits that are asked for.

Legend: B batch, h w token grid, C channels, V codes, M positions.
"""

from typing import Any

import torch.nn.functional as F
from diffusers import UVit2DModel
from torch import Tensor, nn

HEAD_ROWS = 64  # the head runs on a multiple of so many positions


def blocks_of(module: Any) -> list[nn.Module]:
    """The blocks of a transformer or text encoder, which hold nearly all of its activations."""
    if not isinstance(module, UVit2DModel):
        return list(module.text_model.encoder.layers)
    ends = [block for end in (module.down_block, module.up_block) for block in (*end.res_blocks, *end.attention_blocks)]
    return [*ends, *module.transformer_layers]


def trunk(transformer: UVit2DModel, token_ids: Tensor, micro_conds: Tensor, hidden: Tensor, pooled: Tensor) -> Tensor:
    """Everything but the token head: (B,C,h,w), from token ids (B,h,w), conditions (B,5) and the text encoder's."""
    head, transformer.mlm_layer = transformer.mlm_layer, nn.Identity()
    try:
        return transformer(
            input_ids=token_ids, encoder_hidden_states=hidden, pooled_text_emb=pooled, micro_conds=micro_conds
        )
    finally:
        transformer.mlm_layer = head


def head(transformer: UVit2DModel, trunk_BChw: Tensor, index: Tensor) -> Tensor:
    """Logits (M,V) in the trunk's dtype, at the flat positions `index` (M,) of a batch.

    Exact, since the head treats positions independently: 1x1 convolutions and a norm over channels. M is padded to a
    multiple of `HEAD_ROWS` since it changes every step, and torch keeps CPU memory for each shape of a convolution; a
    convolution takes at least one row.
    """
    rows_MC = trunk_BChw.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, index)
    rows_MC = F.pad(rows_MC, (0, 0, 0, -len(index) % HEAD_ROWS if len(index) else HEAD_ROWS))
    return transformer.mlm_layer(rows_MC.T[None, :, :, None])[0, :, : len(index), 0].T
