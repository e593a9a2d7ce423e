"""Two groups, any optimizer, schedules by formula, precisions."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

from diffengine.engine import checkpoint
from diffengine.engine.optim import (
    build_optim_wrapper,
    build_optimizer,
    build_param_scheduler,
    parameter_groups,
    resolve_precision,
)
from diffengine.errors import UserError
from tests.engine import runs
from tests.engine.runs import TEXT_TOO, Toy, train
from tests.support import models

ADAMW = {"type": "torch.optim.AdamW", "lr": 1e-3, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return models.make_pipeline("toy")


def _names(module: nn.Module) -> tuple[set[str], set[str]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decay, rest = ({names[id(item)] for item in group["params"]} for group in parameter_groups(module))
    return decay, rest


def test_groups_of_the_transformer(pipeline: Any) -> None:
    """Trap: GRN's gamma and beta have shape (1,1,1,C), so `ndim < 2` misses them; names miss most norms."""
    decay, rest = _names(pipeline.transformer)
    kinds = dict(pipeline.transformer.named_modules())
    expected = set()
    for name, _ in pipeline.transformer.named_parameters():
        module, _, last = name.rpartition(".")
        norm = "Norm" in type(kinds[module]).__name__ and "Ada" not in type(kinds[module]).__name__
        if last in ("bias", "gamma", "beta") or norm or isinstance(kinds[module], nn.Embedding):
            expected.add(name)
    assert rest == expected
    assert decay == {name for name, _ in pipeline.transformer.named_parameters()} - expected
    shapes = {tuple(p.shape) for n, p in pipeline.transformer.named_parameters() if n.endswith("gamma")}
    assert shapes == {(1, 1, 1, 240)}
    assert "embed.embeddings.weight" in rest
    assert "mlm_layer.conv1.weight" in decay


def test_groups_of_the_text_encoder(pipeline: Any) -> None:
    decay, rest = _names(pipeline.text_encoder)
    words = ("bias", "layer_norm", "layernorm", "layrnorm", "embedding")
    expected = {n for n, _ in pipeline.text_encoder.named_parameters() if any(word in n for word in words)}
    assert rest == expected
    assert "text_projection.weight" in decay


def test_shared_and_frozen_parameters(pipeline: Any) -> None:
    linear = nn.Linear(4, 4)
    model = nn.ModuleList([linear, linear, nn.Linear(4, 4).requires_grad_(False)])
    decay, rest = (group["params"] for group in parameter_groups(model))
    assert [id(item) for item in decay + rest] == [id(linear.weight), id(linear.bias)]


def test_only_what_is_trained_is_in_the_optimizer(toy: Toy, tmp_path: Path) -> None:
    runner = runs.build(toy.config("both"), tmp_path, TEXT_TOO)
    groups = runner.optim_wrapper.optimizer.param_groups
    held = {id(parameter) for group in groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in runner.trainable.parameters()}
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert all(group["fused"] for group in groups)
    assert not any(p.requires_grad for p in runner.trainable.module("vqvae").parameters())


@pytest.mark.parametrize(
    ("options", "decay", "fused"),
    [
        (ADAMW, 0.1, True),
        ({"type": "torch.optim.AdamW"}, 0.01, True),  # the class's own default
        ({**ADAMW, "foreach": True}, 0.1, None),
        ({**ADAMW, "fused": False}, 0.1, False),
        ({"type": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}, 0, True),
        ({"type": "torch.optim.Adagrad"}, 0, None),  # its fused kernel is for CPUs only
        ({"type": "torch.optim.Adafactor", "weight_decay": 0.2}, 0.2, None),
        ({"type": "torch.optim.RMSprop"}, 0, None),
    ],
)
def test_any_optimizer_class(options: dict, decay: float, fused: bool | None) -> None:
    model = nn.Linear(3, 3)
    optimizer = build_optimizer(options, model)
    assert f"torch.optim.{type(optimizer).__name__}" == options["type"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [decay, 0.0]
    assert optimizer.param_groups[0].get("fused") is fused
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_clipping() -> None:
    model = nn.Linear(3, 1, bias=False)
    wrapper = build_optim_wrapper({"type": "torch.optim.SGD", "lr": 1.0}, "fp32", 0.5, model=model)
    before = model.weight.detach().clone()
    wrapper.backward(model(torch.tensor([[3.0, 0.0, 4.0]])).sum())
    norm = wrapper.step()
    assert norm is not None
    assert norm.item() == pytest.approx(5.0)
    torch.testing.assert_close(before - model.weight, torch.tensor([[0.3, 0.0, 0.4]]))
    assert model.weight.grad is None
    free = build_optim_wrapper({"type": "torch.optim.SGD", "lr": 1.0}, "fp32", model=model)
    free.backward(model(torch.tensor([[3.0, 0.0, 4.0]])).sum())
    assert free.step() is None
    with pytest.raises(UserError, match="clip_grad got 0"):
        build_optim_wrapper(ADAMW, "fp32", 0, model=model)


SCHEDULES = {
    "constant": lambda step: 1.0,
    "constant_with_warmup": lambda step: min(1.0, step / 4),
    "linear": lambda step: step / 4 if step < 4 else (10 - step) / 6,
    "cosine": lambda step: step / 4 if step < 4 else 0.5 * (1 + math.cos(math.pi * (step - 4) / 6)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_by_formula(name: str) -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.5)
    warmup = 0 if name == "constant" else 4
    schedule = build_param_scheduler(name, warmup, optimizer=optimizer, num_iters=10)  # type: ignore[arg-type]
    for step in range(10):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * SCHEDULES[name](step)), step
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("name", ["cosine_with_restarts", "polynomial"])
def test_the_other_schedules_are_built(name: Any) -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.5)
    build_param_scheduler(name, 2, optimizer=optimizer, num_iters=10)
    assert optimizer.param_groups[0]["lr"] == 0


@pytest.mark.parametrize(
    ("name", "warmup", "text"), [("constant", 5, "no warm-up"), ("linear", -1, "at least 0")]
)
def test_warmups_that_make_no_sense(name: Any, warmup: int, text: str) -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.5)
    with pytest.raises(UserError, match=text):
        build_param_scheduler(name, warmup, optimizer=optimizer, num_iters=10)


def test_the_schedule_survives_a_resume(toy: Toy, reference: Path, tmp_path: Path) -> None:
    path = toy.config("rate", max_iters=12, lr_schedule="cosine", warmup_iters=3, learning_rate=1e-3)
    runner = runs.build(path, tmp_path, resume=reference / "iter_8.pth")
    expected = 1e-3 * 0.5 * (1 + math.cos(math.pi * 5 / 9))
    assert runner.optim_wrapper.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
    assert runner.param_scheduler.last_epoch == 8
    lines = {line["iter"]: line["lr"] for line in runs.metrics(reference)}  # of the step itself, not the next
    assert lines[1] == 0
    assert lines[5] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 1 / 9)))


@pytest.mark.parametrize(
    ("asked", "got"), [("auto", ("fp32", "auto, on a CPU")), ("bf16", ("bf16", "as configured")),
                       ("fp32", ("fp32", "as configured"))],
)  # fmt: skip
def test_precision_on_a_cpu(asked: Any, got: tuple[str, str]) -> None:
    assert resolve_precision(asked, torch.device("cpu")) == got


def test_fp16_on_a_cpu_is_refused(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="precision got 'fp16' on a CPU"):
        resolve_precision("fp16", torch.device("cpu"))
    assert train(toy.config("half", precision="fp16"), tmp_path) == 2
    assert not list(tmp_path.iterdir())
    assert resolve_precision("fp16", torch.device("cuda")) == ("fp16", "as configured")


class Dtypes(Hook):
    """Keeps the dtype of the transformer's logits and the token ids of the first step."""

    def before_train(self, runner: Any) -> None:
        model = runner.trainable
        self.logits: list[torch.dtype] = []
        self.ids: list[torch.Tensor] = []
        model.transformer.mlm_layer.conv2.register_forward_hook(
            lambda module, inputs, output: self.logits.append(output.dtype)
        )
        model.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: self.ids.append(kwargs["input_ids"]), with_kwargs=True
        )


def test_bf16_computes_low_and_keeps_high(toy: Toy, tmp_path: Path) -> None:
    seen = {}
    for precision in ("fp32", "bf16"):
        runner = runs.build(toy.config(precision, precision=precision), tmp_path / precision)
        hook = Dtypes()
        runner.register_hook(hook)
        runner.train()
        seen[precision] = hook
        state = checkpoint.read(tmp_path / precision / "iter_1.pth")
        assert {tensor.dtype for tensor in state["model"].values()} == {torch.float32}
        assert state["optimizer"]["state"][0]["exp_avg"].dtype == torch.float32
    assert seen["fp32"].logits == [torch.float32]
    assert seen["bf16"].logits == [torch.bfloat16]
    assert torch.equal(seen["fp32"].ids[0], seen["bf16"].ids[0])  # the VQ model is not in the autocast
