"""Gradient checkpointing on diffusers' own class: the same gradients from less that is kept."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffengine.models.amused import AmusedModel
from diffengine.models.amused.model import blocks_of
from diffengine.models.base import PreviewRequest
from tests.models.test_adapters import LORA, TEXT

WAYS: dict[str, dict[str, Any]] = {
    "transformer": {},
    "both": {"train": ["transformer", "text_encoder"]},
    "text encoder alone": {"train": ["text_encoder"]},
    "adapters": {"adapters": {"transformer": {**LORA, "lora_dropout": 0.5}, "text_encoder": TEXT}},
}


def built(toy: Path, dropout: float = 0.0, **options: Any) -> AmusedModel:
    model = AmusedModel(str(toy), **options).train()
    for name in ("transformer", "text_encoder"):
        for module in model.module(name).modules():
            if isinstance(module, nn.Dropout):
                module.p = module.p or dropout
    return model


def saved_bytes(run: Callable[[], Tensor], modules: Iterable[nn.Module]) -> tuple[Tensor, int]:
    """What `run` gives, and the bytes kept for its backward pass: each storage once, parameters apart."""
    own = {value.untyped_storage().data_ptr() for module in modules for value in module.parameters()}
    kept: dict[int, int] = {}
    alive = []  # a storage that is freed gives its address to another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_equal_bit_for_bit(toy: Path, batch: dict[str, Any], way: str, dropout: float) -> None:
    results = []
    for checkpointed in (False, True):
        model = built(toy, dropout, gradient_checkpointing=checkpointed, **WAYS[way])
        prepared = model.prepare(batch)
        modules = [model.module("transformer"), model.module("text_encoder")]
        loss, kept = saved_bytes(lambda: model(prepared)[0], modules)  # noqa: B023
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}, kept, torch.rand(1)))
    (plain, expected, whole, after), (loss, gradients, kept, also_after) = results
    assert torch.equal(loss, plain)
    assert gradients.keys() == expected.keys()  # no name changes
    for name, gradient in gradients.items():
        assert (gradient is None) == (expected[name] is None), name
        assert gradient is None or torch.equal(gradient, expected[name]), name
    assert any(gradient is not None and gradient.any() for gradient in gradients.values())
    assert torch.equal(after, also_after)  # the random state is left where it was
    assert whole > 3 * kept


def test_each_block_runs_once_more_and_only_for_gradients(toy: Path, batch: dict[str, Any]) -> None:
    model = built(toy, gradient_checkpointing=True, train=["transformer", "text_encoder"])
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


def test_nothing_is_kept_of_frozen_encoders(toy: Path, batch: dict[str, Any]) -> None:
    """A frozen text encoder runs without gradients, so it has nothing to run again."""
    model = built(toy, gradient_checkpointing=True)
    runs: list[int] = []
    layer = blocks_of(model.module("text_encoder"))[0]
    layer.register_forward_hook(lambda *call: runs.append(1))
    loss, _ = model(model.prepare(batch))
    loss.backward()
    assert len(runs) == 1


def test_a_checkpointed_model_exports_as_any(toy: Path, tmp_path: Path) -> None:
    from diffengine.export import export_components

    (exported,) = export_components(built(toy, gradient_checkpointing=True), tmp_path)
    assert exported.difference == 0


# ------------------------------------------------------------------------------------ text encoder alone


def test_text_encoder_alone_learns_through_the_transformer(toy: Path, batch: dict[str, Any]) -> None:
    """Its gradient against finite differences in double precision; the transformer stays as it is."""
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
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-3)  # logits are taken in fp32
    assert not any(module.training for module in transformer.modules())
    assert all(p.grad is None for p in transformer.parameters())
    assert all(torch.equal(before[name], value) for name, value in transformer.state_dict().items())
