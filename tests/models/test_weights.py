"""Sample weights, and the shapes that the head runs on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffengine.models.amused import AmusedModel
from diffengine.models.masking import mask_tokens
from tests.models.test_model import assert_close


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_loss_matches_the_formula(toy: Path, batch: dict[str, Any], smoothing: float) -> None:
    """sum_i w_i sum_j ce_ij over samples i and their masked tokens j."""
    model = AmusedModel(str(toy), label_smoothing=smoothing).train()
    weights = [0.25, 3.0, 1.0]
    single = []
    for index in range(3):
        one = {key: value[index : index + 1] for key, value in batch.items()}
        loss, logs = model(model.prepare(one))
        single.append((loss, logs["accuracy"]))
    expected = sum(w * loss for w, (loss, _) in zip(weights, single))
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    loss, logs = model(model.prepare({**batch, "weight": weights, "bucket": [1, 7, 1]}))
    by_bucket = [weights[0] * single[0][0] + weights[2] * single[2][0], weights[1] * single[1][0]]
    assert_close(logs["loss_t"][[1, 7]], torch.stack(by_bucket).detach())
    assert logs["loss_t"].count_nonzero() == 2
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert_close(loss.detach(), expected.detach())
    assert logs["accuracy"] == pytest.approx(sum(w * float(correct) for w, (_, correct) in zip(weights, single)))
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert (gradient is None) == (expected_gradient is None)
        if gradient is not None:
            assert_close(gradient, expected_gradient, 2e-5)


def test_each_masked_token_has_its_samples_weight(model: AmusedModel, batch: dict[str, Any]) -> None:
    prepared = model.prepare({**batch, "weight": [0.5, 2.0, 1.0]})
    assert prepared["target_weights"].tolist() == [0.5] * 1 + [2.0] * 20 + [1.0] * 64
    assert prepared["target_weights"].dtype == torch.float32
    assert "target_weights" not in model.prepare(batch)
    tokens = [np.linspace(0, 1, len(row), dtype=np.float32) for row in batch["masked"]]
    alone = model.prepare({**batch, "target_weights": tokens})["target_weights"]
    assert torch.equal(alone, torch.from_numpy(np.concatenate(tokens)))
    both = model.prepare({**batch, "weight": [0.5, 2.0, 1.0], "target_weights": tokens})["target_weights"]
    assert torch.equal(both, alone * prepared["target_weights"])


def test_weights_of_one_change_nothing(model: AmusedModel, batch: dict[str, Any]) -> None:
    plain, logs = model(model.prepare(batch))
    weighted, other_logs = model(model.prepare({**batch, "weight": [1.0] * 3}))
    assert_close(weighted, plain, 1e-6)
    assert other_logs == logs


def test_head_runs_on_few_shapes_with_the_same_logits(model: AmusedModel, batch: dict[str, Any]) -> None:
    shapes: list[tuple[int, ...]] = []
    logits: list[Tensor] = []

    def record(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        shapes.append(tuple(arguments[0].shape))
        logits.append(output)

    handle = model.transformer.mlm_layer.register_forward_hook(record)
    rng = np.random.default_rng(0)
    try:
        with torch.no_grad():
            for _ in range(30):
                masked = [rng.permutation(64)[: rng.integers(1, 65)] for _ in range(3)]
                prepared = model.prepare({**batch, "masked": masked})
                loss, _ = model(prepared)
                index = prepared["masked_index"]
                text, pooled = model.encode_text(prepared["text_ids"])
                inputs = mask_tokens(prepared["token_ids"], index, model.mask_id)
                full = model.transformer(inputs, text, pooled, prepared["micro_conds"])
                shapes.pop()
                logits.pop()
                rows = full.permute(0, 2, 3, 1).flatten(0, 2)[index]
                assert_close(logits[-1][0, :, : len(index), 0].T, rows, 1e-6)
                targets = prepared["token_ids"].flatten()[index]
                assert_close(loss, F.cross_entropy(rows, targets, reduction="sum"))
    finally:
        handle.remove()
    assert {shape[2] for shape in shapes} <= {64, 128, 192}
