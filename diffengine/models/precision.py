"""Frozen weights in the precision that they are used in."""

import torch
from torch import nn

CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)  # whose weights autocast casts at each use


def hold_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen matrices and kernels of a module in `dtype`, that of the autocast it runs in.

    Autocast would cast them at each use, so what the module gives is the same, bit for bit, in half the
    memory. Norms and embeddings, which it does not cast, stay as they are. Outside of autocast the module no
    longer runs.
    """
    for layer in module.modules():
        if isinstance(layer, CAST):
            for parameter in layer.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
