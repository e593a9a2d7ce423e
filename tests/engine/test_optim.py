"""Parameter groups, optimizers, schedules and precision."""

import math
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UVit2DModel
from mmengine.hooks import Hook
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffengine import cli
from diffengine.engine import checkpoint
from diffengine.engine.optim import (
    build_optim_wrapper,
    build_optimizer,
    build_param_scheduler,
    parameter_groups,
)
from diffengine.errors import UserError
from tests.engine import runs
from tests.engine.runs import WITH_TEXT_ENCODER, Toy, train
from tests.support import models

ADAFACTOR = "transformers.optimization.Adafactor"
ADAMW = {"type": "torch.optim.AdamW", "lr": 1e-3, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return models.make_pipeline("toy")


def _group_names(module: nn.Module) -> tuple[set[str], set[str]]:
    """The names of the parameters with weight decay, and of those without."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decayed, rest = ({names[id(item)] for item in group["params"]} for group in parameter_groups(module))
    return decayed, rest


def test_groups_of_the_transformer(pipeline: Any) -> None:
    """GRN's gamma and beta have shape (1,1,1,C), so `ndim < 2` misses them; a match by name misses most norms."""
    decayed, rest = _group_names(pipeline.transformer)
    modules = dict(pipeline.transformer.named_modules())
    expected = set()
    for name, _ in pipeline.transformer.named_parameters():
        module, _, last = name.rpartition(".")
        norm = "Norm" in type(modules[module]).__name__ and "Ada" not in type(modules[module]).__name__
        if last in ("bias", "gamma", "beta") or norm or isinstance(modules[module], nn.Embedding):
            expected.add(name)
    assert rest == expected
    assert decayed == {name for name, _ in pipeline.transformer.named_parameters()} - expected
    shapes = {tuple(p.shape) for n, p in pipeline.transformer.named_parameters() if n.endswith("gamma")}
    assert shapes == {(1, 1, 1, 240)}
    assert "embed.embeddings.weight" in rest
    assert "mlm_layer.conv1.weight" in decayed


def test_groups_of_the_text_encoder(pipeline: Any) -> None:
    decayed, rest = _group_names(pipeline.text_encoder)
    fragments = ("bias", "layer_norm", "layernorm", "layrnorm", "embedding")
    expected = {n for n, _ in pipeline.text_encoder.named_parameters() if any(fragment in n for fragment in fragments)}
    assert rest == expected
    assert "text_projection.weight" in decayed


def test_shared_and_frozen_parameters(pipeline: Any) -> None:
    linear = nn.Linear(4, 4)
    model = nn.ModuleList([linear, linear, nn.Linear(4, 4).requires_grad_(False)])
    decayed, rest = (group["params"] for group in parameter_groups(model))
    assert [id(item) for item in decayed + rest] == [id(linear.weight), id(linear.bias)]


def test_the_optimizer_holds_only_trained_parameters(toy: Toy, tmp_path: Path) -> None:
    runner = runs.build(toy.config("both"), tmp_path, WITH_TEXT_ENCODER)
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
        ({"type": "torch.optim.AdamW"}, 0.01, True),  # the default of the class
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
    optimizer = build_optimizer(options, parameter_groups(model))
    assert f"torch.optim.{type(optimizer).__name__}" == options["type"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [decay, 0.0]
    assert optimizer.param_groups[0].get("fused") is fused
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_fused_equals_unfused(toy: Toy, tmp_path: Path) -> None:
    """Three AdamW steps on a U-ViT with equal gradients: equal up to rounding."""
    weights = []
    for fused in (True, False):
        runner = runs.build(toy.config("fused"), tmp_path / str(fused), f"optim_wrapper.optimizer.fused={fused}")
        optimizer = runner.optim_wrapper.optimizer
        assert [group["fused"] for group in optimizer.param_groups] == [fused, fused]
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for parameter in runner.trainable.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        weights.append([parameter.detach() for parameter in runner.trainable.parameters()])
    for one, other in zip(*weights):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


class Grouped(nn.Linear):
    """A layer whose weight and bias are two groups of gradients."""

    def gradient_group(self, name: str) -> str:
        return name


def test_clipping() -> None:
    model: Any = Grouped(3, 1, bias=False)
    wrapper = build_optim_wrapper({"type": "torch.optim.SGD", "lr": 1.0}, "fp32", 0.5, model=model)
    before = model.weight.detach().clone()
    wrapper.backward(model(torch.tensor([[3.0, 0.0, 4.0]])).sum())
    norms = wrapper.step()
    assert norms.total.item() == pytest.approx(5.0)
    assert norms.groups is None  # there is one
    torch.testing.assert_close(before - model.weight, torch.tensor([[0.3, 0.0, 0.4]]))
    assert model.weight.grad is None
    free = build_optim_wrapper({"type": "torch.optim.SGD", "lr": 1.0}, "fp32", model=model)
    free.backward(model(torch.tensor([[3.0, 0.0, 4.0]])).sum())
    assert free.step().total.item() == pytest.approx(5.0)
    torch.testing.assert_close(model.weight, before - torch.tensor([[3.3, 0.0, 4.4]]))
    with pytest.raises(UserError, match="clip_grad got 0"):
        build_optim_wrapper(ADAMW, "fp32", 0, model=model)


def test_clipping_equals_torchs_and_keeps_norms_by_group(toy: Toy, tmp_path: Path) -> None:
    """Total and gradients bit for bit, of a U-ViT and a text encoder of which one layer has no gradient this time."""
    runner = runs.build(toy.config("groups"), tmp_path, WITH_TEXT_ENCODER, "optim_wrapper.clip_grad=0.5")
    wrapper, named, generator = runner.optim_wrapper, dict(runner.trainable.named_parameters()), torch.Generator()
    clipped: list[torch.Tensor] = []
    wrapper.optimizer.register_step_pre_hook(
        lambda *_: clipped.extend(p.grad.clone() for p in wrapper.parameters if p.grad is not None)
    )
    for unused in (None, "transformer.mlm_layer.conv2.weight"):
        clipped.clear()
        for name, parameter in named.items():
            parameter.grad = None if name == unused else torch.randn(parameter.shape, generator=generator)
        used = [parameter for parameter in wrapper.parameters if parameter.grad is not None]
        before = {parameter: parameter.grad.clone() for parameter in used}
        norms = wrapper.step()
        for parameter, gradient in before.items():
            parameter.grad = gradient.clone()
        total = torch.nn.utils.clip_grad_norm_(used, 0.5, foreach=True)
        assert torch.equal(norms.total, total)
        assert all(torch.equal(one, parameter.grad) for one, parameter in zip(clipped, used))
        assert set(wrapper.groups) == {"embed", "down_up", "layers", "head", "text_encoder"}
        for group, norm in zip(wrapper.groups, norms.groups):
            of_group = [
                before[parameter].flatten() for name, parameter in named.items()
                if name != unused and runner.trainable.gradient_group(name) == group
            ]  # fmt: skip
            assert norm.item() == pytest.approx(torch.cat(of_group).double().norm().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"type": "torch.optim.AdamW", "lr": -1.0},
            r"torch.optim.AdamW cannot be built from .*: Invalid learning rate: -1.0",
        ),
        ({"type": ADAFACTOR}, r"Adafactor got lr=None; expected a number, .*relative_step=False"),
        (
            {"type": ADAFACTOR, "lr": 1e-3},
            r"Adafactor cannot be built from .*: Cannot combine manual `lr` and `relative_step=True`",
        ),
    ],
)
def test_invalid_optimizer_options_are_refused(options: dict, text: str) -> None:
    with pytest.raises(UserError, match=text):
        build_optimizer(options, parameter_groups(nn.Linear(3, 3)))


OTHER_OPTIMIZERS = {
    "adafactor": {"type": ADAFACTOR, "lr": 1e-3, "relative_step": False, "scale_parameter": False},
    "lion": {"type": "lion_pytorch.Lion", "lr": 1e-4},
    "8bit": {"type": "bitsandbytes.optim.AdamW8bit", "lr": 1e-3},
    "8bit_lion": {"type": "bitsandbytes.optim.Lion8bit", "lr": 1e-4},
    "prodigy": {"type": "prodigyopt.Prodigy", "lr": 1.0},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes", "ignore::FutureWarning:bitsandbytes")
@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_optimizers_of_other_packages_train_and_resume(toy: Toy, tmp_path: Path, name: str) -> None:
    """A checkpoint stores their state, 8-bit blocks included, bit for bit."""
    pytest.importorskip(OTHER_OPTIMIZERS[name]["type"].partition(".")[0])
    optimizer = {"weight_decay": 0.01, **OTHER_OPTIMIZERS[name]}
    path = toy.config(f"with_{name}", max_iters=3, checkpoint_every=1, optim_wrapper={"optimizer": optimizer},
                      lr_schedule="constant_with_warmup", warmup_iters=2)  # fmt: skip
    assert train(path, tmp_path / "one") == 0
    resumed = runs.build(path, tmp_path / "two", resume=tmp_path / "one" / "iter_2.pth")
    resumed.train()
    one, two = (checkpoint.read(tmp_path / folder / "iter_3.pth") for folder in ("one", "two"))
    assert two["model"].keys() == one["model"].keys()
    assert all(torch.equal(one["model"][key], two["model"][key]) for key in one["model"])
    assert one["optimizer"]["param_groups"] == two["optimizer"]["param_groups"]
    start = checkpoint.read(tmp_path / "one" / "iter_1.pth")["model"]
    assert not any(torch.equal(one["model"][key], start[key]) for key in one["model"] if "mlm_layer.conv" in key)
    if name.startswith("8bit"):
        assert any(item.dtype == torch.uint8 for item in _tensors(one["optimizer"]["state"]))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [item for child in value.values() for item in _tensors(child)]
    return [value] if isinstance(value, torch.Tensor) else []


SKIPS = {
    "fused": ADAMW,
    "foreach": {**ADAMW, "foreach": True},
    "momentum": {"type": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9},
    "adagrad": {"type": "torch.optim.Adagrad", "lr": 0.1},
    **OTHER_OPTIMIZERS,
    "schedule_free": {"type": "schedulefree.AdamWScheduleFree", "lr": 1e-3},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes", "ignore::FutureWarning:bitsandbytes", "error")
@pytest.mark.parametrize("clip_grad", [1.0, None])
@pytest.mark.parametrize("name", SKIPS)
def test_a_bad_step_changes_neither_weights_nor_state(name: str, clip_grad: float | None) -> None:
    """Gradients that are NaN (N) or infinite (G), or an infinite loss (L), also first of all."""
    pytest.importorskip(SKIPS[name]["type"].partition(".")[0])
    results = []
    for sequence in ("NG.LG..N", "..."):
        torch.manual_seed(0)
        model: Any = Grouped(100, 50)
        wrapper = build_optim_wrapper(dict(SKIPS[name]), "fp32", clip_grad, model=model)
        schedule = build_param_scheduler(optimizer=wrapper.optimizer, num_iters=10)
        inputs = iter(torch.randn(10, 4, 100))
        for step in sequence:
            loss = model(next(inputs) if step == "." else torch.ones(4, 100)).square().mean()
            wrapper.backward(loss + (math.inf if step == "L" else 0))
            if step == "N":
                model.weight.grad[3, 4] = math.nan
            elif step == "G":
                model.bias.grad[0] = -math.inf
            norms = wrapper.step()
            schedule.step()
            assert norms.total.isfinite() == (step == ".")
        results.append({"model": model.state_dict(), "optimizer": wrapper.optimizer.state_dict()["state"]})
    runs.assert_equal(*results)


def test_a_missing_package_is_named(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.startswith("bitsandbytes.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    optimizer = {"type": "bitsandbytes.optim.AdamW8bit", "lr": 1e-4}
    assert train(toy.config("eight", optim_wrapper={"optimizer": optimizer}), tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "type 'bitsandbytes.optim.AdamW8bit' cannot be imported" in error
    assert "pip install 'diffengine[8bit]'" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


SCHEDULES = {
    "constant": lambda step: 1.0,
    "constant_with_warmup": lambda step: min(1.0, step / 4),
    "linear": lambda step: step / 4 if step < 4 else (10 - step) / 6,
    "cosine": lambda step: step / 4 if step < 4 else 0.5 * (1 + math.cos(math.pi * (step - 4) / 6)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_follow_their_formulas(name: str) -> None:
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


@pytest.mark.parametrize(("name", "warmup", "text"), [("constant", 5, "no warm-up"), ("linear", -1, "at least 0")])
def test_invalid_warmups_are_refused(name: Any, warmup: int, text: str) -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.5)
    with pytest.raises(UserError, match=text):
        build_param_scheduler(name, warmup, optimizer=optimizer, num_iters=10)


def test_the_schedule_continues_after_a_resume(toy: Toy, reference: Path, tmp_path: Path) -> None:
    path = toy.config("rate", max_iters=12, lr_schedule="cosine", warmup_iters=3, learning_rate=1e-3)
    runner = runs.build(path, tmp_path, resume=reference / "iter_8.pth")
    expected = 1e-3 * 0.5 * (1 + math.cos(math.pi * 5 / 9))
    assert runner.optim_wrapper.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
    assert runner.param_scheduler.last_epoch == 8
    logged = {line["iter"]: line["lr"] for line in runs.metrics(reference)}  # the rate that the step used
    assert logged[1] == 0
    assert logged[5] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 1 / 9)))


def test_warmup_schedule_and_clipping_count_optimizer_steps(toy: Toy, tmp_path: Path) -> None:
    """Four micro-batches a step give the same as one."""
    rates, norms = [], []
    for micro in (None, 1):
        path = toy.config(f"counted{micro}", max_iters=6, micro_batch_size=micro, lr_schedule="linear",
                          warmup_iters=2, learning_rate=1e-3, clip_grad=1e-3)  # fmt: skip
        assert train(path, tmp_path / str(micro), "--cfg-options", WITH_TEXT_ENCODER) == 0
        lines = runs.metrics(tmp_path / str(micro))
        rates.append([line["lr"] for line in lines])
        norms.append(lines[0]["grad_norm"])
        state = checkpoint.read(tmp_path / str(micro) / "iter_6.pth")
        assert state["counters"]["iter"] == state["param_scheduler"]["last_epoch"] == 6
        assert {float(values["step"]) for values in state["optimizer"]["state"].values()} == {6.0}
    assert rates[0] == rates[1] == pytest.approx([0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)  # clipped once, for the whole step


GROUPS = [{"match": "*.mlm_layer.*", "lr": 0.02}, {"match": "transformer.*", "lr": 0.05, "betas": [0.5, 0.9]}]


def test_the_first_entry_that_matches_wins_and_decay_stays_split(toy: Toy, tmp_path: Path) -> None:
    """Each parameter has the options of its entry, and the decay that it has without entries."""
    path = toy.config("grouped", param_groups=GROUPS)
    run = runs.build(path, tmp_path, WITH_TEXT_ENCODER, "optim_wrapper.optimizer.lr=0.5")
    names = {parameter: name for name, parameter in run.trainable.named_parameters()}
    undecayed = {names[item] for item in parameter_groups(run.trainable)[1]["params"]}
    seen = []
    for group in run.optim_wrapper.optimizer.param_groups:
        for name in [names[parameter] for parameter in group["params"]]:
            head, text = ".mlm_layer." in name, name.startswith("text_encoder.")
            assert group["initial_lr"] == (0.02 if head else 0.5 if text else 0.05), name
            assert list(group["betas"]) == ([0.9, 0.999] if head or text else [0.5, 0.9]), name
            assert group["weight_decay"] == (0.0 if name in undecayed else 0.01), name
            seen.append(name)
    assert sorted(seen) == sorted(names.values())


class Two(nn.Module):
    """Two layers of one output each."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)

    def gradient_group(self, name: str) -> str:
        return name


def test_the_schedule_scales_each_groups_own_rate() -> None:
    """SGD's formula w - lr g, with the cosine of diffusers."""
    model: Any = Two()
    groups = [{"match": "two.*", "lr": 0.25}]
    sgd = {"type": "torch.optim.SGD", "lr": 1.0}
    wrapper = build_optim_wrapper(sgd, "fp32", param_groups=groups, model=model)
    schedule = build_param_scheduler("cosine", optimizer=wrapper.optimizer, num_iters=4)
    expected = [model.one.weight.detach().clone(), model.two.weight.detach().clone()]
    inputs = torch.tensor([[3.0, 0.0, 4.0]])
    for step in range(4):
        wrapper.backward((model.one(inputs) + model.two(inputs)).sum())
        wrapper.step()
        schedule.step()
        factor = 0.5 * (1 + math.cos(math.pi * step / 4))
        expected = [weight - rate * factor * inputs for weight, rate in zip(expected, (1.0, 0.25))]
    torch.testing.assert_close([model.one.weight.detach(), model.two.weight.detach()], expected)


def test_groups_are_logged_and_resume(toy: Toy, tmp_path: Path) -> None:
    """The logged rate is that of the parameters that no entry matches; amsgrad gives one group more state."""
    groups = [{"match": "*.mlm_layer.*", "lr": 0.02, "amsgrad": True}]
    path = toy.config("groups", max_iters=2, checkpoint_every=1, param_groups=groups, learning_rate=0.004,
                      lr_schedule="constant_with_warmup", warmup_iters=2)  # fmt: skip
    assert train(path, tmp_path / "one") == 0
    assert [line["lr"] for line in runs.metrics(tmp_path / "one")] == [0, 0.002]
    run = runs.build(path, tmp_path / "two", resume=tmp_path / "one" / "iter_1.pth")
    run.train()
    runs.assert_equal_checkpoints(tmp_path / "one" / "iter_2.pth", tmp_path / "two" / "iter_2.pth")
    sizes = [parameter.numel() for parameter in run.trainable.transformer.mlm_layer.parameters()]
    line = f"param_groups: '*.mlm_layer.*': {len(sizes)} tensors, {sum(sizes):,} parameters, lr 0.02\n"
    assert (tmp_path / "one" / "log.txt").read_text().count(line) == 1
    assert cli.main(["convert", str(tmp_path / "two")]) == 0


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ([{"match": "tow.*"}], r"param_groups.0 got match='tow.\*', which no trained parameter matches; did you mean"),
        ([{"match": "zzz"}], "no trained parameter matches; they have names such as one.weight"),
        ([{"match": "*"}, {"match": "two.*"}], "param_groups.1 got match='two.*', and entries before it match all"),
        ([{"match": "two.*", "lr": -1.0}], "Invalid learning rate: -1.0"),
        ([{"match": "two.*", "lr": None}], "got lr=None; expected a number|'<=' not supported"),
        ([{"match": "two.*", "fused": False}], "param_groups.0 got fused, which torch.optim.AdamW has for all"),
    ],
)
def test_groups_that_cannot_be_are_refused(groups: list[dict], text: str) -> None:
    model: Any = Two()
    with pytest.raises(UserError, match=text.replace("two.*'", r"two.\*'")) as error:
        build_optim_wrapper(ADAMW, "fp32", param_groups=groups, model=model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ([{"match": "*", "learning": 1.0}], "optim_wrapper.param_groups.0: unknown key 'learning' for AdamW"),
        ([{"match": "*", "eps": "small"}], "optim_wrapper.param_groups.0.eps got 'small' (str); expected float"),
        ([{"lr": 1.0}], "optim_wrapper.param_groups.0 got {'lr': 1.0}; expected dict(match="),
        ([{"match": "*", "type": "torch.optim.SGD"}], "expected dict(match="),
        ({"match": "*"}, "optim_wrapper.param_groups got {'match': '*'} (dict); expected list[dict] or None"),
    ],
)
def test_groups_are_checked_before_the_model_is_read(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture, groups: Any, text: str
) -> None:
    assert train(toy.config("wrong_groups", param_groups=groups, pretrained="nowhere"), tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_schedule_free_weights_follow_their_formulas() -> None:
    """Schedule-free SGD (arXiv 2405.15682): z of plain SGD, x its mean, y between them; g is 5 at every step."""
    model: Any = nn.Linear(1, 1, bias=False)
    model.gradient_group = lambda name: name
    options = {"type": "schedulefree.SGDScheduleFree", "lr": 0.1, "momentum": 0.75}
    wrapper = build_optim_wrapper(options, "fp32", model=model)
    z = x = model.weight.item()
    for step in range(1, 6):
        wrapper.backward(model(torch.tensor([[5.0]])).sum())
        wrapper.step()
        z -= 0.1 * 5
        x += (z - x) / step
        live = model.weight.detach().clone()
        assert live.item() == pytest.approx(0.25 * z + 0.75 * x, rel=1e-5)
        with wrapper.eval_weights():
            assert model.weight.item() == pytest.approx(x, rel=1e-5)
        assert torch.equal(model.weight, live)
    assert all(group["train_mode"] for group in wrapper.optimizer.param_groups)


HEAD = "transformer.mlm_layer.conv1.weight"
SCHEDULE_FREE = {"optimizer": {"type": "schedulefree.AdamWScheduleFree", "lr": 0.01, "weight_decay": 0.01}}


def test_what_looks_at_a_schedule_free_run_sees_its_average(toy: Toy, tmp_path: Path) -> None:
    """Checkpoints, exports and previews; the run resumes bit for bit, with previews or without."""
    settings: dict[str, Any] = {"max_iters": 3, "checkpoint_every": 1, "optim_wrapper": SCHEDULE_FREE}
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(toy.config("free", **settings), one) == 0
    path = toy.config("free_shown", **settings, prompts=["a"], preview_every=1)
    run = runs.build(path, two, resume=one / "iter_1.pth")
    run.train()
    runs.assert_equal_checkpoints(one / "iter_3.pth", two / "iter_3.pth")
    a, b = (checkpoint.read(folder / "iter_3.pth") for folder in (one, two))
    runs.assert_equal(a["train_weights"], b["train_weights"])
    names = {parameter: name for name, parameter in run.trainable.named_parameters()}
    for parameter, values in run.optim_wrapper.optimizer.state.items():
        name = names[parameter]
        assert torch.equal(b["train_weights"][name], parameter)
        assert torch.equal(b["model"][name], parameter.detach().lerp(values["z"], 1 - 1 / 0.9))
    assert not torch.equal(
        b["model"]["transformer.mlm_layer.conv1.weight"], run.trainable.transformer.mlm_layer.conv1.weight
    )
    exported = UVit2DModel.from_pretrained(two / "transformer").state_dict()
    seen = run.pipeline().transformer.state_dict()
    with run.averaged_weights():
        runs.assert_equal(run.trainable.trained_state(), b["model"])
    for name, weight in b["model"].items():
        assert torch.equal(exported[name.removeprefix("transformer.")], weight)
        assert torch.equal(seen[name.removeprefix("transformer.")], weight)
    checkpoint.write(two / "iter_2.pth", {name: value for name, value in b.items() if name != "train_weights"})
    with pytest.raises(UserError, match="'train_weights' has not the names that the optimizer trains"):
        runs.build(path, two, resume=two / "iter_2.pth")


def test_what_a_schedule_free_optimizer_makes_superfluous(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A schedule gets a warning, an average is refused."""
    path = toy.config("free_schedule", optim_wrapper=SCHEDULE_FREE, lr_schedule="cosine",
                      custom_hooks=[{"type": "diffengine.engine.hooks.EMAHook"}])  # fmt: skip
    assert train(path, tmp_path) == 2
    output = capsys.readouterr()
    assert "warning: the lr schedule 'cosine' with AdamWScheduleFree: it averages the weights instead" in output.out
    assert "EMAHook got the optimizer AdamWScheduleFree, which averages the weights itself" in output.err


def test_prodigy_refuses_rates_by_group() -> None:
    model: Any = Two()
    with pytest.raises(UserError, match=r"Prodigy cannot train these param_groups: .*different lr values"):
        build_optim_wrapper(dict(OTHER_OPTIMIZERS["prodigy"]), "fp32", param_groups=[{"match": "two.*", "lr": 0.5}],
                            model=model)  # fmt: skip


@pytest.mark.parametrize("train_", [["text_encoder"], ["transformer", "text_encoder"]])
def test_the_chosen_components_are_trained(toy: Toy, tmp_path: Path, train_: list[str]) -> None:
    path = toy.config("chosen", max_iters=3, learning_rate=1e-2)
    assert train(path, tmp_path, "--cfg-options", f"model.train={train_}") == 0
    state = checkpoint.read(tmp_path / "iter_3.pth")["model"]
    assert {name.partition(".")[0] for name in state} == set(train_)
    before = {
        "text_encoder": models.make_pipeline("toy").text_encoder.state_dict(),
        "transformer": models.make_pipeline("toy").transformer.state_dict(),
    }
    for component in train_:
        same = [
            name for name, item in before[component].items()
            if torch.equal(item, state.get(f"{component}.{name}", item))
        ]  # fmt: skip
        assert len(same) < len(before[component]) / 4, component
    assert {path.name for path in tmp_path.iterdir() if (path / "config.json").exists()} == set(train_)


class ForwardHook(Hook):
    """Records the dtype of the logits and the token ids in each forward pass of the transformer."""

    def before_train(self, runner: Any) -> None:
        model = runner.trainable
        self.dtypes: list[torch.dtype] = []
        self.ids: list[torch.Tensor] = []
        model.transformer.mlm_layer.conv2.register_forward_hook(
            lambda module, inputs, output: self.dtypes.append(output.dtype)
        )
        model.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: self.ids.append(kwargs.get("input_ids")), with_kwargs=True
        )


def test_bf16_computes_in_bf16_and_stores_fp32(toy: Toy, tmp_path: Path) -> None:
    hooks = {}
    for precision in ("fp32", "bf16"):
        runner = runs.build(toy.config(precision, precision=precision), tmp_path / precision)
        hook = ForwardHook()
        runner.register_hook(hook)
        runner.train()
        hooks[precision] = hook
        state = checkpoint.read(tmp_path / precision / "iter_1.pth")
        assert {tensor.dtype for tensor in state["model"].values()} == {torch.float32}
        assert state["optimizer"]["state"][0]["exp_avg"].dtype == torch.float32
    assert hooks["fp32"].dtypes[0] == torch.float32  # the later ones are from the export
    assert hooks["bf16"].dtypes[0] == torch.bfloat16
    assert torch.equal(hooks["fp32"].ids[0], hooks["bf16"].ids[0])  # the VQ model runs without autocast


class Casts(TorchDispatchMode):
    """Records a weak reference to the storage of each cast."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[weakref.ref] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.storages.append(weakref.ref(result.untyped_storage()))
        return result


def test_autocast_does_not_cache_casts_of_weights() -> None:
    """torch's own autocast keeps them until it ends, which wastes memory with gradient checkpointing."""
    alive = {}
    layer: Any = Grouped(8, 8, bias=False)
    ours = build_optim_wrapper({"type": "torch.optim.AdamW"}, "bf16", model=layer).autocast()
    for name, autocast in {"ours": ours, "torch": torch.autocast("cpu", torch.bfloat16)}.items():
        with torch.no_grad(), Casts() as casts, autocast:
            assert layer(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
            alive[name] = [storage() is not None for storage in casts.storages]
    assert alive == {"ours": [False], "torch": [True]}
