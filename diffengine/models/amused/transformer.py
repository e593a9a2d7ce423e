"""Running a U-ViT in two steps, so that the token head computes only the logits that are asked for.

Legend: B batch, h w token grid, C channels, V codes, M positions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from diffusers import UVit2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

HEAD_ROWS = 64  # the head runs on a multiple of so many positions


def blocks_of(module: Any) -> list[nn.Module]:
    """The blocks of a transformer or text encoder, which hold nearly all of its activations."""
    if not isinstance(module, UVit2DModel):
        return list(module.text_model.encoder.layers)
    ends = [block for end in (module.down_block, module.up_block) for block in (*end.res_blocks, *end.attention_blocks)]
    return [*ends, *module.transformer_layers]


def group_of(name: str) -> str:
    """The group of a transformer's parameter: "embed" (tokens and conditions), "down_up", "layers" or "head"."""
    child = name.partition(".")[0]
    groups = {"down_block": "down_up", "up_block": "down_up", "transformer_layers": "layers", "mlm_layer": "head"}
    return "layers" if child.startswith("project_") else groups.get(child, "embed")


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


def condition_layers(transformer: UVit2DModel) -> list[nn.Module]:
    """The layers that see the text and the conditions but no tokens."""
    layers = [transformer.encoder_proj, transformer.encoder_proj_layer_norm, transformer.cond_embed]
    for end in (transformer.down_block, transformer.up_block):
        layers += [block.cond_embeds_mapper for block in end.res_blocks]
        for block in end.attention_blocks:
            attentions = (block.attn1, block.attn2)
            layers += [block.kv_mapper, *(layer for item in attentions for layer in (item.to_k, item.to_v))]
    for block in transformer.transformer_layers:
        layers += [norm.linear for norm in (block.norm1, block.norm2, block.norm3)]
        layers += [block.attn2.to_k, block.attn2.to_v]
    return [layer for layer in layers if layer is not None]


@contextmanager
def conditions_once(transformer: UVit2DModel) -> Iterator[None]:
    """Inside, condition layers run once for each number of rows: all passes must get the same conditions there.

    Two of diffusers' detours take a tenth of a small model's pass each: attention reads its processor's signature, and
    the transformer walks over all of its modules to learn its dtype. Inside, attention calls its processor directly and
    the walk ends at the first layer. The outputs are equal, bit for bit.
    """
    layers = condition_layers(transformer)
    attentions = [module for module in transformer.modules() if isinstance(module, Attention)]
    before = [(module, vars(module).get("forward")) for module in (*layers, *attentions)]
    for layer in layers:
        layer.forward = partial(_once, layer.forward, {})
    for attention in attentions:
        attention.forward = partial(attention.processor, attention)
    first_layer = ("embed.embeddings", transformer.embed.embeddings)
    transformer.named_modules = lambda *_, **__: iter([first_layer])
    try:
        yield
    finally:
        del transformer.named_modules
        for layer, forward in before:
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _once(forward: Callable[..., Tensor], kept: dict[int, Tensor], rows: Tensor, *args: Any, **options: Any) -> Tensor:
    if len(rows) not in kept:
        kept[len(rows)] = forward(rows, *args, **options)
    return kept[len(rows)]
