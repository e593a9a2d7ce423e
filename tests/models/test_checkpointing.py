"""Gradient checkpointing of diffusers' model: the same gradients with less memory."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffengine.models.amused import AmusedModel
from diffengine.models.amused.transformer import blocks_of
from diffengine.models.base import PreviewRequest
from tests.models.test_adapters import LORA, TEXT

WAYS: dict[str, dict[str, Any]] = {
    "transformer": {},
    "both": {"train": ["transformer", "text_encoder"]},
    "text encoder alone": {"train": ["text_encoder"]},
    "adapters": {"adapters": {"transformer": {**LORA, "lora_dropout": 0.5}, "text_encoder": TEXT}},
}


def build(toy: Path, dropout: float = 0.0, **options: Any) -> AmusedModel:
    model = AmusedModel(str(toy), **options).train()
    for name in ("transformer", "text_encoder"):
        for module in model.module(name).modules():
            if isinstance(module, nn.Dropout):
                module.p = module.p or dropout
    return model


def saved_bytes(run: Callable[[], Tensor], modules: Iterable[nn.Module]) -> tuple[Tensor, int]:
    """The result of `run`, and the bytes saved for its backward pass: parameters excluded, each storage once."""
    parameters = {value.untyped_storage().data_ptr() for module in modules for value in module.parameters()}
    saved: dict[int, int] = {}
    alive = []  # keeps each storage alive, so that its address is not reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(saved.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_equal_bit_for_bit(toy: Path, batch: dict[str, Any], way: str, dropout: float) -> None:
    results = []
    for checkpointed in (False, True):
        model = build(toy, dropout, gradient_checkpointing=checkpointed, **WAYS[way])
        prepared = model.prepare(batch)
        modules = [model.module("transformer"), model.module("text_encoder")]
        loss, num_bytes = saved_bytes(lambda: model(prepared)[0], modules)  # noqa: B023
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}, num_bytes, torch.rand(1)))
    (plain_loss, expected, plain_bytes, rng_plain), (loss, gradients, num_bytes, rng) = results
    assert torch.equal(loss, plain_loss)
    assert gradients.keys() == expected.keys()  # the names are the same
    for name, gradient in gradients.items():
        assert (gradient is None) == (expected[name] is None), name
        assert gradient is None or torch.equal(gradient, expected[name]), name
    assert any(gradient is not None and gradient.any() for gradient in gradients.values())
    assert torch.equal(rng, rng_plain)  # the same random state afterwards
    assert plain_bytes > 3 * num_bytes


def test_each_block_runs_twice_only_with_gradients(toy: Path, batch: dict[str, Any]) -> None:
    model = build(toy, gradient_checkpointing=True, train=["transformer", "text_encoder"])
    blocks = blocks_of(model.transformer) + blocks_of(model.text_encoder)
    assert len(blocks) == 2 * 2 + 2 + len(model.text_encoder.text_model.encoder.layers)
    runs: Counter[int] = Counter()
    for index, block in enumerate(blocks):
        first = next(module for module in block.modules() if not list(module.children()))

        def count(module: nn.Module, arguments: Any, index: int = index) -> None:
            runs[index] += 1

        first.register_forward_pre_hook(count)
    loss, _ = model(model.prepare(batch))
    assert set(runs.values()) == {1}
    loss.backward()
    assert len(runs) == len(blocks)
    assert set(runs.values()) == {2}
    runs.clear()
    model.preview(PreviewRequest(["a"], options={"num_inference_steps": 1, "guidance_scale": 1.0}))
    assert set(runs.values()) == {1}


def test_frozen_encoder_runs_once(toy: Path, batch: dict[str, Any]) -> None:
    """A frozen text encoder runs without gradients, so it is not recomputed."""
    model = build(toy, gradient_checkpointing=True)
    runs: list[int] = []
    layer = blocks_of(model.module("text_encoder"))[0]
    layer.register_forward_hook(lambda *call: runs.append(1))
    loss, _ = model(model.prepare(batch))
    loss.backward()
    assert len(runs) == 1


def test_checkpointed_model_exports(toy: Path, tmp_path: Path) -> None:
    from diffengine.export import export_components

    (exported,) = export_components(build(toy, gradient_checkpointing=True), tmp_path)
    assert exported.difference == 0


# ------------------------------------------------------------------------------------- text encoder only


def test_text_encoder_trains_through_a_frozen_transformer(toy: Path, batch: dict[str, Any]) -> None:
    """Its gradient equals finite differences in double precision, and the transformer does not change."""
    model = AmusedModel(str(toy), train=["text_encoder"]).train()
    transformer = model.module("transformer")
    prepared = {
        name: value.double() if value.is_floating_point() else value for name, value in model.prepare(batch).items()
    }
    model.double()
    transformer.double()
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    loss, _ = model(prepared)
    loss.backward()
    rng = torch.Generator().manual_seed(0)
    parameters = [p for p in model.parameters() if p.grad is not None]
    assert len(parameters) == len(list(model.text_encoder.parameters()))
    directions = [torch.randn(p.shape, generator=rng, dtype=torch.float64) for p in parameters]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions))
    losses = []
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            for p, d in zip(parameters, directions):
                p.add_(d, alpha=step)
            losses.append(model(prepared)[0].item())
            for p, d in zip(parameters, directions):
                p.add_(d, alpha=-step)
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-3)  # the logits are fp32
    assert not any(module.training for module in transformer.modules())
    assert all(p.grad is None for p in transformer.parameters())
    assert all(torch.equal(before[name], value) for name, value in transformer.state_dict().items())
