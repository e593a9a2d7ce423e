"""Peak memory of a training step, counted with fake tensors, for machines without a GPU.

The model is built as in a run. Its tensors are then replaced by fake tensors, which have a shape but no values. A step
runs on them, and every storage is counted from its allocation until it is freed. Images and captions come from the
token cache, so no encoder is on the device. A real GPU needs slightly more: autocast runs some norms in fp32 on a GPU
and in bf16 on a CPU, and CUDA libraries and the allocator need memory too.
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

MASKED = 2 / math.pi  # mean fraction of masked tokens under the cosine schedule


class Storages(TorchDispatchMode):
    """Counts the bytes of all storages that operations allocate inside the block: `live` now, and `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakSet = weakref.WeakSet()

    def add(self, value: Any) -> None:
        """Count a tensor's storage until it is freed."""
        if isinstance(value, Tensor) and (storage := value.untyped_storage()) not in self._seen:
            self._seen.add(storage)
            weakref.finalize(storage, self._free, storage.size())
            self.live += storage.size()
            self.peak = max(self.peak, self.live)

    def _free(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self.add(value)
        return result


def peak_of(resolved: dict[str, Any], micro_batch_size: int) -> int:
    """Peak bytes of a step in bf16: weights, gradients, optimizer state and activations.

    Args:
        resolved: a config from `load_config` that trains the transformer of an AmusedModel.
        micro_batch_size: images per forward pass.
    """
    model = build_model(resolved, {}, seed=0)
    assert isinstance(model, AmusedModel)
    model.hold_frozen(torch.bfloat16)
    model.train()
    storages = Storages()
    with FakeTensorMode(), storages:
        replace_tensors(model)
        batch = make_batch(model, micro_batch_size)
        micro_batches = resolved["train_dataloader"]["batch_size"] // micro_batch_size
        for _ in range(min(micro_batches, 2)):  # during the second one, the gradients of the first are in memory
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # as in StepOptimWrapper
                loss, logs = model(batch)
            loss.backward()
            del loss, logs
    return storages.peak + optimizer_bytes(model, resolved["optim_wrapper"]["optimizer"]["type"])


def replace_tensors(model: nn.Module) -> None:
    """Replace all weights and buffers by empty tensors."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            empty = torch.empty(weight.shape, dtype=weight.dtype)
            setattr(module, name, nn.Parameter(empty, requires_grad=weight.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def make_batch(model: AmusedModel, images: int) -> dict[str, Tensor]:
    """A batch as `prepare` returns it for this number of images from the token cache."""
    sizes = model.components.transformer_config
    side = sizes["sample_size"]
    return {
        "token_ids": torch.zeros(images, side, side, dtype=torch.long),
        "masked_index": torch.zeros(round(images * side * side * MASKED), dtype=torch.long),
        "micro_conds": torch.zeros(images, 5),
        "hidden_states": torch.zeros(images, model.components.tokenizer.model_max_length, sizes["encoder_hidden_size"]),
        "pooled_text_emb": torch.zeros(images, sizes["cond_embed_dim"]),
    }


def optimizer_bytes(model: nn.Module, optimizer: str) -> int:
    """Bytes of the optimizer state: two values per trained weight, in fp32 or in the 8-bit layout of bitsandbytes.

    In the 8-bit layout, tensors with fewer than 4,096 values stay in fp32, every 256 values share a scale, and each
    tensor has two tables of 256 values (bitsandbytes.optim.optimizer, `min_8bit_size`).
    """
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    if not optimizer.endswith("8bit"):
        return sum(8 * size for size in sizes)
    return sum(2 * (size + 4 * -(-size // 256) + 4 * 256) if size >= 4096 else 8 * size for size in sizes)
