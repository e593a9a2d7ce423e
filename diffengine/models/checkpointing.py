"""Gradient checkpointing from outside: blocks forget their activations and compute them again when needed."""

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Let each block keep its inputs only, and run its forward a second time in the backward pass.

    Gradients are the same, dropout too: the random state is put back for the second run. Names of parameters
    do not change; without gradients a block runs as before.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
