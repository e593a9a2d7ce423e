"""Memory and time of gradient checkpointing at the full size: 512 px, batch size 2, fp32 on a CPU.

Needs 15 GB of memory and some minutes. Run with -s to see the numbers.
"""

import time

import pytest
import torch
from diffusers import UVit2DModel
from torch import Tensor

from diffengine.models.amused.transformer import blocks_of, head, trunk
from diffengine.models.blocks import wrap_blocks
from tests.models.test_checkpointing import saved_bytes
from tests.support import models

pytestmark = pytest.mark.soak


def test_full_size() -> None:
    """Gradients are bit-identical with and without checkpointing, and fewer activations are kept."""
    torch.manual_seed(0)
    transformer = UVit2DModel(**models.transformer_config("full", 512))
    ids = torch.randint(8192, (2, 32, 32))
    index = torch.randperm(2 * 1024)[:1200]
    text, pooled, conditions = torch.randn(2, 77, 768), torch.randn(2, 768), torch.full((2, 5), 512.0)

    def run() -> Tensor:
        masked = ids.flatten().index_fill(0, index, 8255).view_as(ids)
        return head(transformer, trunk(transformer, masked, conditions, text, pooled), index).square().mean()

    expected: dict[str, Tensor] = {}
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            wrap_blocks(blocks_of(transformer), checkpointed=True, compiled=False)
        started = time.perf_counter()
        loss, kept = saved_bytes(run, [transformer])
        loss.backward()
        results.append((kept, time.perf_counter() - started))
        gradients = {name: value.grad for name, value in transformer.named_parameters()}
        for name, gradient in gradients.items():
            assert gradient is None or not checkpointed or torch.equal(gradient, expected[name]), name
        expected = gradients
        transformer.zero_grad(set_to_none=True)
    (without, _), (kept, _) = results
    for name, (size, seconds) in zip(("without", "with"), results):
        figures = f"{size / 1e9:.2f} GB kept, {seconds:.1f} s forward and backward"
        print(f"\nfull size, 512 px, batch size 2, {name} checkpointing: {figures}")
    assert without > 5 * kept
