"""Frozen weights stored in autocast's precision: the same step bit for bit, with half the memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffengine.models.amused import AmusedModel
from diffengine.models.frozen import CAST
from tests.models.test_adapters import LORA, TEXT, WAYS, adapter

Gradients = dict[str, Tensor]


def step(model: AmusedModel, batch: dict[str, Any]) -> tuple[Tensor, Gradients]:
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(model.prepare(batch))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def bytes_of(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.parameters() if not value.requires_grad)


@pytest.mark.parametrize("way", [*WAYS, "both", "text alone"])
def test_step_is_equal_bit_for_bit(toy: Path, batch: dict[str, Any], way: str) -> None:
    options: dict[str, Any] = {
        "both": {"adapters": {"transformer": LORA, "text_encoder": TEXT}},
        "text alone": {"train": ["text_encoder"]},
    }.get(way) or {"adapters": {"transformer": adapter(way)}}
    plain, half = (AmusedModel(str(toy), **options).train() for _ in range(2))
    half.hold_frozen(torch.bfloat16)
    loss, gradients = step(plain, batch)
    other_loss, other_gradients = step(half, batch)
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys()
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)
    smaller = {
        name: bytes_of(half.module(name)) < bytes_of(plain.module(name)) for name in ("transformer", "text_encoder")
    }
    halved = way not in ("dora", "oft", "ia3")  # these read the base's weights, or change its inputs
    assert smaller == {"transformer": halved, "text_encoder": way != "text alone"}


def test_only_weights_that_autocast_casts_are_halved(toy: Path, batch: dict[str, Any]) -> None:
    model = AmusedModel(str(toy), adapters={"transformer": LORA}).train()
    model.hold_frozen(torch.bfloat16)
    transformer = model.exportable["transformer"]
    cast = {
        id(p) for layer in transformer.modules() if isinstance(layer, CAST) for p in layer.parameters(recurse=False)
    }
    for value in transformer.parameters():
        halved = id(value) in cast and not value.requires_grad
        assert value.dtype == (torch.bfloat16 if halved else torch.float32)
    assert {value.dtype for value in model.module("vqvae").parameters()} == {torch.float32}


def test_full_precision_during_an_export(toy: Path) -> None:
    model = AmusedModel(str(toy), adapters={"transformer": LORA}).train()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.hold_frozen(torch.bfloat16)
    with model.full_precision():
        inside = {name: value.detach().clone() for name, value in model.named_parameters()}
    assert all(torch.equal(before[name], inside[name]) for name in before)
    after = dict(model.named_parameters())
    assert {value.dtype for value in after.values()} == {torch.float32, torch.bfloat16}
    assert all(torch.equal(after[name].float(), before[name].to(after[name].dtype).float()) for name in before)
