"""How a model's blocks run in training: compiled, checkpointed, or both.

Names of parameters do not change, and without gradients (previews, exports) a block runs eagerly.
"""

from collections.abc import Callable, Iterable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def wrap_blocks(blocks: Iterable[nn.Module], *, checkpointed: bool, compiled: bool) -> None:
    """Set how each block runs when gradients are recorded, whatever was set before.

    Args:
        checkpointed: run a block again in the backward pass, with the same dropout: less memory, more time.
        compiled: run it through `torch.compile`: equal to rounding, except that dropout draws other numbers, the same
            in each run. Blocks of one class share a graph, compiled again at the second batch size, for all sizes.
    """
    if compiled:
        torch._dynamo.config.optimize_ddp = False  # it would cut each block's graph at the ends of DDP's buckets
    for block in blocks:
        eager = MethodType(type(block).forward, block)
        run: Callable[..., Any] = torch.compile(eager) if compiled else eager
        if checkpointed:
            run = partial(checkpoint, run, use_reentrant=False)
        block.forward = partial(_run, eager, run)


def _run(without_gradients: Callable[..., Any], with_gradients: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Previews run eager: compiling for each of their modes and sizes would take minutes."""
    return (with_gradients if torch.is_grad_enabled() else without_gradients)(*args, **kwargs)
