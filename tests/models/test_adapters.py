"""Adapters: they are trained, the base is not, and options that would change the base are rejected."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffengine.errors import UserError
from diffengine.models.amused import AmusedModel
from diffengine.models.base import PreviewRequest

LORA: dict[str, Any] = {
    "type": "peft.LoraConfig", "r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_k", "to_v"],
}  # fmt: skip
TEXT: dict[str, Any] = {"type": "peft.LoraConfig", "r": 2, "target_modules": ["q_proj"]}
OTHERS = {"type", "target_modules"}
WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"alpha_pattern": {"to_k": 16}, "rank_pattern": {"to_q": 2}},
    "lokr": {"type": "peft.LoKrConfig", "r": 4, "alpha": 8},
    "loha": {"type": "peft.LoHaConfig", "r": 4, "alpha": 8},
    "oft": {"type": "peft.OFTConfig", "oft_block_size": 4},
    "ia3": {"type": "peft.IA3Config", "feedforward_modules": []},
}


def adapter(way: str) -> dict[str, Any]:
    defaults = {} if "type" in WAYS[way] else LORA
    return {**defaults, "target_modules": LORA["target_modules"], **WAYS[way]}


def base_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of the base, by the names that they have without the adapter."""
    return {
        name.replace(".base_layer", ""): value.detach().clone()
        for name, value in module.named_parameters()
        if not value.requires_grad
    }


def train(model: AmusedModel, batch: dict[str, Any], steps: int = 2, seed: int = 0) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        torch.manual_seed(seed + step)
        loss, _ = model(model.prepare(batch))
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # DDP waits for every gradient
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("way", WAYS)
def test_only_the_adapter_is_trained_and_saved(toy: Path, batch: dict[str, Any], way: str) -> None:
    model = AmusedModel(str(toy), adapters={"transformer": adapter(way)}).train()
    plain = AmusedModel(str(toy))
    expected = dict(plain.transformer.named_parameters())
    assert base_of(model.transformer).keys() == expected.keys()
    before = {name: value.clone() for name, value in model.trained_state().items()}
    train(model, batch)
    for name, value in base_of(model.transformer).items():
        assert torch.equal(value, expected[name]), name
    after = model.trained_state()
    assert after.keys() == {f"transformer.{n}" for n, p in model.transformer.named_parameters() if p.requires_grad}
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert sum(value.numel() for value in after.values()) < 0.2 * sum(v.numel() for v in expected.values())
    again = AmusedModel(str(toy), adapters={"transformer": adapter(way)}, seed=5).train()
    again.load_trained_state(after, "checkpoint 'x'")
    prepared = model.prepare(batch)
    assert torch.equal(model.eval()(prepared)[0], again.eval()(prepared)[0])


def test_new_adapter_changes_no_output(toy: Path, batch: dict[str, Any]) -> None:
    plain, model = AmusedModel(str(toy)), AmusedModel(str(toy), adapters={"transformer": LORA})
    prepared = model.prepare(batch)
    assert torch.equal(plain(prepared)[0], model(prepared)[0])
    assert model.exportable == {"transformer": model.transformer}
    assert model.build_pipeline().transformer is model.transformer
    assert model.preview(PreviewRequest(["a"], options={"num_inference_steps": 2}))


def test_seed_determines_the_adapter_and_global_rng_is_kept(toy: Path) -> None:
    before = torch.random.get_rng_state()
    models = [AmusedModel(str(toy), adapters={"transformer": LORA}, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), before)
    first, same, other = (model.trained_state() for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("options", "trained"), [
    ({"adapters": {"transformer": LORA}, "train": ["text_encoder"]}, {"transformer", "text_encoder"}),
    ({"adapters": {"text_encoder": TEXT}, "train": ["transformer"]}, {"transformer", "text_encoder"}),
    ({"adapters": {"text_encoder": TEXT, "transformer": LORA}}, {"transformer", "text_encoder"}),
    ({"adapters": {"text_encoder": TEXT}}, {"text_encoder"}),
    ({"adapters": {"text_encoder": TEXT}, "train": []}, {"text_encoder"}),
])  # fmt: skip
def test_adapters_with_full_training(
    toy: Path, batch: dict[str, Any], options: dict[str, Any], trained: set[str]
) -> None:
    model = AmusedModel(str(toy), **options).train()
    assert set(model.exportable) == trained
    train(model, batch, steps=1)
    assert {name.split(".")[0] for name in model.trained_state()} == trained
    full = set(options.get("train", []))
    for name in trained:
        whole = all(p.requires_grad for p in model.module(name).parameters())
        assert whole == (name in full), name


def test_seed_determines_adapter_dropout(toy: Path, batch: dict[str, Any]) -> None:
    states = []
    for seed in (0, 0, 9):
        model = AmusedModel(str(toy), adapters={"transformer": {**LORA, "lora_dropout": 0.5}}).train()
        train(model, batch, seed=seed)
        states.append(model.trained_state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"train": ["transformer"], "adapters": {"transformer": LORA}}, "transformer is both in `train`"),
    "none": ({"train": [], "adapters": {}}, r"train got \[\]; expected .*, or \[\] with adapters"),
    "unknown component": ({"adapters": {"vqvae": LORA}}, "adapters got 'vqvae'; expected one or both of"),
    "no config": ({"adapters": {"transformer": {"r": 4}}}, r"got \{'r': 4\}; expected dict\(type=LoraConfig"),
    "no class of peft": ({"adapters": {"transformer": {"type": "os.system"}}}, "a config class of peft"),
}  # fmt: skip
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown option": ({"rank": 4}, "unexpected keyword argument 'rank'"),
    "no targets": ({"target_modules": None}, "adapters.transformer needs target_modules"),
    "one target that is not there": ({"target_modules": ["to_q", "q_proj"]}, "has 'q_proj', which no module"),
    "a pattern that matches nothing": ({"target_modules": "nothing"}, "not found in the base model"),
    "a rank for nothing": ({"rank_pattern": {"to_z": 2}}, "rank_pattern has 'to_z', which matches no module"),
    "bias": ({"bias": "all"}, "bias='all' would change the base model"),
    "modules_to_save": ({"modules_to_save": ["embed"]}, "modules_to_save trains what is no adapter"),
    "parameters": ({"target_parameters": ["embed"]}, "target_parameters trains what is no adapter"),
    "pissa": ({"init_lora_weights": "pissa"}, r"changes the base model \(down_block.*to_q.weight\)"),
    "inference": ({"inference_mode": True}, "has nothing to train"),
    "adalora": ({"type": "peft.AdaLoraConfig", "r": 8, "total_step": 9}, "AdaLoraConfig cannot be trained"),
    "shared": ({"type": "peft.VeraConfig", "lora_alpha": None, "r": 2}, "VeraConfig"),
    "prompts": ({"type": "peft.PromptTuningConfig"}, "PromptTuningConfig"),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED)
def test_rejected_adapters(toy: Path, case: str) -> None:
    options, message = REJECTED[case]
    with pytest.raises(UserError, match=message) as error:
        AmusedModel(str(toy), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", OPTIONS)
def test_rejected_options(toy: Path, case: str) -> None:
    options, message = OPTIONS[case]
    with pytest.raises(UserError, match=message) as error:
        AmusedModel(str(toy), adapters={"transformer": {**LORA, **options}})
    assert "\n" not in str(error.value)


def test_adapter_needs_a_base(toy: Path) -> None:
    with pytest.raises(UserError, match="transformer is built from sizes, so an adapter has no base"):
        AmusedModel(str(toy), transformer={"hidden_size": 32}, adapters={"transformer": LORA})
