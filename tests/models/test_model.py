"""Loss and gradients against the formula, inputs against the pipeline's, and frozen components."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AmusedPipeline, UVit2DModel
from torch import Tensor, nn

from diffengine.errors import UserError
from diffengine.models.amused import AmusedModel
from diffengine.models.amused.transformer import head, trunk
from diffengine.models.base import describe
from tests.models.conftest import CAPTIONS

TOLERANCE = 1e-5  # of a tensor's largest value, or of 0.01: float32 sums in a different order


def assert_close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert (got - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1e-2)


def formula(folder: Path, batch: dict[str, Any], smoothing: float, train_text: bool) -> tuple[Any, ...]:
    """-sum over masked positions of the log probability of their token, smoothed, with diffusers' classes.

    Returns the loss, its gradients by name, and the number of correct predictions.
    """
    pipe = AmusedPipeline.from_pretrained(folder)
    with torch.no_grad():
        latents = pipe.vqvae.encode(batch["image"]).latents.permute(0, 2, 3, 1)
    distances = (latents[..., None, :] - pipe.vqvae.quantize.embedding.weight).square().sum(-1)
    token_ids = distances.argmin(-1).flatten(1)
    labels = torch.full_like(token_ids, -100)
    for row, indices in enumerate(batch["masked"]):
        labels[row, indices] = token_ids[row, indices]
    input_ids = torch.where(labels == -100, token_ids, 79)
    text_ids = pipe.tokenizer(
        batch["text"], padding="max_length", max_length=64, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.set_grad_enabled(train_text):
        text = pipe.text_encoder(text_ids, output_hidden_states=True)
    logits = pipe.transformer(input_ids.view(3, 8, 8), text.hidden_states[-2], text.text_embeds, batch["micro_conds"])
    log_p = logits.flatten(2).log_softmax(dim=1)
    taken = labels.clamp_min(0)[:, None]
    ce = -(1 - smoothing) * log_p.gather(1, taken)[:, 0] - smoothing * log_p.mean(dim=1)
    loss = (ce * (labels != -100)).sum()
    loss.backward()
    other = F.cross_entropy(logits.flatten(2), labels, ignore_index=-100, reduction="sum", label_smoothing=smoothing)
    assert_close(loss, other)
    gradients = {f"transformer.{name}": value.grad for name, value in pipe.transformer.named_parameters()}
    if train_text:
        gradients |= {f"text_encoder.{name}": value.grad for name, value in pipe.text_encoder.named_parameters()}
    correct = (logits.flatten(2).argmax(1) == labels).sum()
    return loss.detach(), gradients, correct


@pytest.mark.parametrize(("smoothing", "train"), [
    (0.0, ["transformer"]), (0.1, ["transformer"]), (0.1, ["transformer", "text_encoder"]),
])  # fmt: skip
def test_loss_and_gradients_match_the_formula(toy: Path, batch: dict[str, Any], smoothing: float, train: list) -> None:
    model = AmusedModel(str(toy), train=train, label_smoothing=smoothing).train()
    loss, logs = model(model.prepare(batch))
    loss.backward()
    expected, gradients, correct = formula(toy, batch, smoothing, "text_encoder" in train)
    assert_close(loss.detach(), expected)
    assert logs.keys() == {"accuracy"}
    assert logs["accuracy"] == correct
    named = dict(model.named_parameters())
    assert named.keys() == gradients.keys()
    for name, parameter in named.items():
        if parameter.grad is None or gradients[name] is None:
            assert parameter.grad is None, name
            assert gradients[name] is None, name
        else:
            assert_close(parameter.grad, gradients[name])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_by_bucket_leave_the_gradients_bit_equal(toy: Path, batch: dict[str, Any], smoothing: float) -> None:
    """Compared with torch's own sum over all masked tokens; each bucket has the loss of its images alone."""
    model = AmusedModel(str(toy), label_smoothing=smoothing).train()
    sums: list[Tensor] = []
    for index in range(3):
        one = {key: value[index : index + 1] for key, value in batch.items()}
        sums.append(model(model.prepare(one))[0].detach())
    loss, logs = model(model.prepare({**batch, "bucket": [6, 2, 6]}))
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert_close(
        logs["loss_t"], torch.stack([0 * loss, 0 * loss, sums[1], *[0 * loss] * 3, sums[0] + sums[2], 0 * loss])
    )
    cross_entropy = F.cross_entropy

    def summed(*arguments: Any, reduction: str, **options: Any) -> Tensor:
        return cross_entropy(*arguments, reduction="sum", **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "cross_entropy", summed)
        other, _ = model(model.prepare(batch))
    for gradient, expected in zip(gradients, torch.autograd.grad(other, list(model.parameters()), allow_unused=True)):
        assert (gradient is None) == (expected is None)
        assert gradient is None or torch.equal(gradient, expected)


def test_groups_of_gradients(toy: Path) -> None:
    model = AmusedModel(str(toy), train=["transformer", "text_encoder"])
    groups: dict[str, set[str]] = {}
    for name, _ in model.named_parameters():
        groups.setdefault(model.gradient_group(name), set()).add(".".join(name.split(".")[:2]))
    assert groups == {
        "embed": {f"transformer.{name}" for name in ("embed", "encoder_proj", "encoder_proj_layer_norm", "cond_embed")},
        "down_up": {"transformer.down_block", "transformer.up_block"},
        "layers": {"transformer.transformer_layers"} | {
            f"transformer.project_{name}" for name in ("to_hidden", "to_hidden_norm", "from_hidden", "from_hidden_norm")
        },
        "head": {"transformer.mlm_layer"},
        "text_encoder": {"text_encoder.text_model", "text_encoder.text_projection"},
    }  # fmt: skip


def test_training_and_pipeline_give_the_transformer_the_same_inputs(model: AmusedModel, batch: dict[str, Any]) -> None:
    inputs: list[dict[str, Tensor]] = []

    def record(module: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        inputs.append({**options, "input_ids": arguments[0] if arguments else options["input_ids"]})

    handle = model.transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        model(model.prepare({**batch, "micro_conds": torch.tensor([[32.0, 32, 0, 0, 6]] * 3)}))
        model.build_pipeline()(CAPTIONS, guidance_scale=1.0, num_inference_steps=1)
    finally:
        handle.remove()
    training, sampling = inputs
    for name in ("encoder_hidden_states", "pooled_text_emb"):
        assert training[name].dtype == sampling[name].dtype
        assert_close(training[name].detach(), sampling[name])
    assert training["micro_conds"].shape == sampling["micro_conds"].shape == (3, 5)
    assert sampling["micro_conds"].tolist() == [[32.0, 32.0, 0.0, 0.0, 6.0]] * 3  # width, height, top, left, score
    assert torch.equal(training["micro_conds"], sampling["micro_conds"])
    assert training["input_ids"].shape == sampling["input_ids"].shape == (3, 8, 8)
    assert bool((sampling["input_ids"] == model.mask_id).all())  # sampling starts from the mask id of training
    assert training["input_ids"].flatten()[model.prepare(batch)["masked_index"]].unique().tolist() == [79]


def head_gradients(transformer: UVit2DModel, index: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    ids, hidden, pooled, conditions = (
        torch.randint(64, (2, 8, 8)), torch.randn(2, 64, 48), torch.randn(2, 40), torch.rand(2, 5)
    )  # fmt: skip
    transformer.zero_grad()
    if index is None:
        logits = transformer(ids, hidden, pooled, conditions).permute(0, 2, 3, 1).flatten(0, 2)
    else:
        logits = head(transformer, trunk(transformer, ids, conditions, hidden, pooled), index)
    picked = logits if index is not None else logits[torch.tensor([3, 64, 127])]
    picked.square().sum().backward()
    return picked.detach(), {
        name: value.grad.clone() for name, value in transformer.named_parameters() if value.grad is not None
    }


def test_masked_head_equals_full_head(toy: Path) -> None:
    transformer = UVit2DModel.from_pretrained(toy / "transformer")
    full, expected = head_gradients(transformer, None)
    masked, gradients = head_gradients(transformer, torch.tensor([3, 64, 127]))
    assert_close(masked, full)
    assert gradients.keys() == expected.keys()
    for name in expected:
        assert_close(gradients[name], expected[name])


def test_head_is_restored_after_use_and_after_an_error(toy: Path) -> None:
    transformer = UVit2DModel.from_pretrained(toy / "transformer")
    own, names = transformer.mlm_layer, list(dict(transformer.named_children()))
    ids, hidden, pooled, conditions = (torch.zeros(shape) for shape in ((1, 8, 8), (1, 64, 48), (1, 40), (1, 5)))
    trunk(transformer, ids.long(), conditions, hidden, pooled)
    assert transformer.mlm_layer is own
    with pytest.raises(IndexError):
        trunk(transformer, ids.long() + 10**6, conditions, hidden, pooled)
    assert transformer.mlm_layer is own
    assert list(dict(transformer.named_children())) == names


# ---------------------------------------------------------------------------------------------- frozen


def test_frozen_components_are_neither_trained_nor_saved(toy: Path, batch: dict[str, Any]) -> None:
    model = AmusedModel(str(toy)).train()
    loss, _ = model(model.prepare(batch))
    loss.backward()
    assert {name.split(".")[0] for name in model.state_dict()} == {"transformer"}
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"transformer"}
    assert {name.split(".")[0] for name in model.trained_state()} == {"transformer"}
    assert model.exportable == {"transformer": model.transformer}
    for name in ("vqvae", "text_encoder"):
        frozen = model.module(name)
        assert not any(module.training for module in frozen.modules())
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen.parameters())
    assert all(parameter.requires_grad for parameter in model.transformer.parameters())
    assert model.transformer.training


def test_text_encoder_has_gradients_only_if_trained(toy: Path, batch: dict[str, Any]) -> None:
    frozen = AmusedModel(str(toy)).train()
    prepared = frozen.prepare(batch)
    assert not frozen.encode_text(prepared["text_ids"])[0].requires_grad
    alone = AmusedModel(str(toy), train=["text_encoder"]).train()
    loss, _ = alone(alone.prepare(batch))
    loss.backward()
    assert set(alone.exportable) == {"text_encoder"}
    assert all(parameter.grad is not None for parameter in alone.text_encoder.parameters())
    transformer = alone.module("transformer")
    assert all(parameter.grad is None for parameter in transformer.parameters())
    assert not transformer.training


def test_frozen_components_are_loaded_and_moved_on_first_use(toy: Path) -> None:
    model = AmusedModel(str(toy))
    assert model._frozen["vqvae"].devices == {}
    model.module("vqvae")
    assert model._frozen["vqvae"].devices != {}
    assert model._frozen["text_encoder"].devices == {}
    moved = model._frozen["text_encoder"].on(torch.device("meta"))
    assert {parameter.device.type for parameter in moved.parameters()} == {"meta"}


def test_loading_keeps_the_global_rng(toy: Path, batch: dict[str, Any]) -> None:
    """A frozen component is loaded in the middle of a step, between seeding and dropout."""
    before = torch.random.get_rng_state()
    model = AmusedModel(str(toy))
    model(model.prepare(batch))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("options", "message"), [
    ({"train": []}, r"train got \[\]; expected one or both of \['transformer', 'text_encoder'\]"),
    ({"train": ["vqvae"]}, r"train got \['vqvae'\]"),
    ({"label_smoothing": 1.0}, r"label_smoothing got 1.0; expected a number in \[0, 1\)"),
    ({"vq_batch_size": 0}, "vq_batch_size got 0; expected at least 1"),
])  # fmt: skip
def test_options_out_of_range(toy: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AmusedModel(str(toy), **options)


def test_chance_loss(model: AmusedModel) -> None:
    name, value = model.chance_loss
    assert name == "ln 64"
    assert value == pytest.approx(4.158883)


def test_trained_state_is_strict(toy: Path) -> None:
    model = AmusedModel(str(toy))
    state = {name: tensor + 1 for name, tensor in model.trained_state().items()}
    model.load_trained_state(state, "checkpoint 'x'")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.trained_state().items())
    first, last = min(state), max(state)
    shapes = {name: describe(tensor) for name, tensor in state.items()}
    broken = {name: tensor for name, tensor in state.items() if name != first}
    broken["other"] = broken.pop(last)
    broken["transformer.embed.embeddings.weight"] = torch.zeros(2, 2)
    with pytest.raises(UserError) as error:
        model.load_trained_state(broken, "checkpoint 'x'")
    assert str(error.value) == (
        f"checkpoint 'x' does not fit this model: 4 weights differ (other is {shapes[last]}, expected absent; "
        f"{first} is absent, expected {shapes[first]}; transformer.embed.embeddings.weight is (2, 2) float32, "
        "expected (80, 56) float32; ...); use the config it was trained with"
    )
