"""The peak memory of a step, counted without computing it: for a machine that has no GPU.

A model is loaded as a run loads it. Then tensors that have shapes and no values take the place of its own, a
step runs over them, and each storage is counted from when it is made to when it goes. Images and captions
come from the token cache, so no encoder is on the device. A GPU takes somewhat more: its autocast runs some
norms in fp32 that a CPU's runs in bf16, and its libraries and its allocator take memory of their own.
"""

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffengine.engine.build import build_model
from diffengine.models.amused import AmusedModel

MASKED = 2 / math.pi  # of the tokens, in the mean of the cosine schedule


class Storages(TorchDispatchMode):
    """Bytes of all storages that operations make inside: now, and at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakSet = weakref.WeakSet()

    def add(self, value: Any) -> None:
        """Count a tensor's storage until it goes."""
        if isinstance(value, Tensor) and (storage := value.untyped_storage()) not in self._seen:
            self._seen.add(storage)
            weakref.finalize(storage, self._drop, storage.size())
            self.live += storage.size()
            self.peak = max(self.peak, self.live)

    def _drop(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self.add(value)
        return result


def peak_of(resolved: dict[str, Any], at_once: int) -> int:
    """Bytes of a step in bf16: weights, gradients, the optimizer's state, and what is computed.

    Args:
        resolved: of `config.load`: an AmusedModel, whose transformer learns.
        at_once: images per forward.
    """
    model = build_model(resolved, {}, seed=0)
    assert isinstance(model, AmusedModel)
    model.hold_frozen(torch.bfloat16)
    model.train()
    storages = Storages()
    with FakeTensorMode(), storages:
        empty_out(model)
        batch = batch_of(model, at_once)
        parts = resolved["train_dataloader"]["batch_size"] // at_once
        for _ in range(min(parts, 2)):  # with the second, there are gradients from the start
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # as StepOptimWrapper
                loss, logs = model(batch)
            loss.backward()
            del loss, logs
    return storages.peak + state_bytes(model, resolved["optim_wrapper"]["optimizer"]["type"])


def empty_out(model: nn.Module) -> None:
    """Put empty tensors in the place of all weights and buffers."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            empty = torch.empty(weight.shape, dtype=weight.dtype)
            setattr(module, name, nn.Parameter(empty, requires_grad=weight.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def batch_of(model: AmusedModel, images: int) -> dict[str, Tensor]:
    """What `prepare` gives of so many images from the token cache."""
    sizes = model.components.transformer_config
    side = sizes["sample_size"]
    return {
        "token_ids": torch.zeros(images, side, side, dtype=torch.long),
        "masked_index": torch.zeros(round(images * side * side * MASKED), dtype=torch.long),
        "micro_conds": torch.zeros(images, 5),
        "hidden_states": torch.zeros(images, model.components.tokenizer.model_max_length, sizes["encoder_hidden_size"]),
        "pooled_text_emb": torch.zeros(images, sizes["cond_embed_dim"]),
    }


def state_bytes(model: nn.Module, optimizer: str) -> int:
    """Of the optimizer: two values for each trained one, in fp32; or in 8 bits as bitsandbytes keeps them.

    There, what has fewer than 4,096 values stays in fp32, each 256 values share a scale, and each tensor has
    two tables of 256 (bitsandbytes.optim.optimizer, `min_8bit_size`).
    """
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    if not optimizer.endswith("8bit"):
        return sum(8 * size for size in sizes)
    return sum(2 * (size + 4 * -(-size // 256) + 4 * 256) if size >= 4096 else 8 * size for size in sizes)
