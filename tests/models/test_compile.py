"""Compiled blocks: the same step, with one graph per block class."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from diffengine.models.amused import AmusedModel
from diffengine.models.base import PreviewRequest
from tests.models.conftest import make_batch
from tests.models.test_adapters import LORA, TEXT

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not:UserWarning"
)  # raised by dynamo itself
BLOCK_CLASSES = 3  # ConvNextBlock, SkipFFTransformerBlock, BasicTransformerBlock
ADAPTERS = {"transformer": {**LORA, "lora_dropout": 0.0}, "text_encoder": TEXT}


@pytest.fixture(params=["eager"])
def counter(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Counts graphs and runs them with torch's usual kernels. A graph break is an error."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(request.param)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    yield counter
    torch._dynamo.reset()


def take(batch: dict[str, Any], rows: int, masked: int) -> dict[str, Any]:
    """The first `rows` samples, with `masked` tokens masked in each."""
    selected = {name: value[:rows] for name, value in batch.items()}
    indices = [np.random.default_rng(row).permutation(64)[:masked] for row in range(rows)]
    return {**selected, "masked": indices, "num_targets": [masked] * rows}


def step(model: AmusedModel, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss and gradients from a fixed random state."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    loss, _ = model(model.prepare(batch))
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize("counter", ["aot_eager"], indirect=True)  # forward and backward traced, as for inductor
@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({}, BLOCK_CLASSES),
        # The first block's input depends on no trained parameter: one more graph for its class.
        pytest.param({"adapters": ADAPTERS, "gradient_checkpointing": True}, BLOCK_CLASSES + 1, marks=pytest.mark.soak),
    ],
    ids=["full", "adapters, checkpointed"],
)
def test_compiled_equals_eager(toy: Path, counter: Any, options: dict[str, Any], graphs: int) -> None:
    model = AmusedModel(str(toy), **options).train()
    batch = make_batch()
    loss, gradients = step(model, batch)
    names = list(model.state_dict())
    assert model.compile_blocks() == 2 * 2 + 2
    assert counter.frame_count == 0
    compiled_loss, compiled = step(model, batch)
    assert counter.frame_count == graphs
    assert list(model.state_dict()) == names
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    for masked in (1, 40, 64, 17):  # steps 2 to 5
        step(model, take(batch, 3, masked))
    model.preview(PreviewRequest(["a cat"], options={"num_inference_steps": 2, "guidance_scale": 4.0}))
    assert counter.frame_count == graphs


def test_micro_batch_sizes_share_two_graphs(toy: Path, counter: Any) -> None:
    """Micro-batch sizes differ by at most one: there is one graph for the first size, and one for all others."""
    model = AmusedModel(str(toy)).train()
    model.compile_blocks()
    batch = make_batch()
    for rows in (2, 3):
        step(model, take(batch, rows, 5))
    assert counter.frame_count == 2 * BLOCK_CLASSES
    wide = {name: value + value for name, value in batch.items() if isinstance(value, list)}
    wide |= {name: torch.cat([value, value]) for name, value in batch.items() if isinstance(value, Tensor)}
    for rows in (3, 2, 5, 4):
        step(model, take(wide, rows, 9))
    assert counter.frame_count == 2 * BLOCK_CLASSES


def test_frozen_transformer_is_compiled_for_training_the_text_encoder(toy: Path, counter: Any) -> None:
    model = AmusedModel(str(toy), train=["text_encoder"]).train()
    model.compile_blocks()
    _, gradients = step(model, make_batch())
    assert all(gradient is not None for gradient in gradients.values())
    assert counter.frame_count == BLOCK_CLASSES + 1


def test_same_random_state_gives_the_same_dropout(toy: Path, counter: Any) -> None:
    """In each run, and when a checkpointed block is recomputed."""
    results = []
    for checkpointed in (False, True, True):
        model = AmusedModel(str(toy), gradient_checkpointing=checkpointed).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        model.compile_blocks()
        results.append(step(model, make_batch()))
    (loss, expected), *others = results
    for other, gradients in others:
        assert torch.equal(other, loss)
        assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())


def test_compiled_model_exports(toy: Path, counter: Any, tmp_path: Path) -> None:
    from diffengine.export import export_components

    model = AmusedModel(str(toy)).train()
    model.compile_blocks()
    (exported,) = export_components(model, tmp_path)
    assert exported.difference == 0
    assert counter.frame_count == 0


@pytest.mark.soak
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_inductor(toy: Path, dropout: float) -> None:
    """The real backend: equal up to rounding, and with dropout equal in each run. Needs a C++ compiler."""
    torch._dynamo.reset()
    model = AmusedModel(str(toy), gradient_checkpointing=True).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    loss, gradients = step(model, make_batch())
    model.compile_blocks()
    first, compiled = step(model, make_batch())
    again, _ = step(model, make_batch())
    assert torch.equal(first, again)
    assert torch.isclose(first, loss, rtol=1e-5) == (dropout == 0)
    if not dropout:
        for name, gradient in gradients.items():
            torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    torch._dynamo.reset()


def test_no_more_graphs_than_shapes(toy: Path, counter: Any) -> None:
    """Four shapes, in whole and in smaller micro-batches."""
    model = AmusedModel(str(toy)).train()
    model.compile_blocks()
    batch = take(make_batch(), 3, 5)
    shapes = [(32, 32), (24, 40), (16, 32), (24, 32)]
    losses = []
    for rows in (3, 2):
        for width, height in shapes:
            images = torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(width))
            shaped = {**{name: value[:rows] for name, value in batch.items()}, "image": images}
            tokens = width * height // 16
            shaped["masked"] = [row[row < tokens] for row in shaped["masked"]]
            losses.append(step(model, shaped)[0])
    assert torch.isfinite(torch.stack(losses)).all()
    assert counter.frame_count <= 3 * BLOCK_CLASSES  # the second and third shapes make sizes dynamic
