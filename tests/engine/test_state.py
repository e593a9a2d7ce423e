"""A damaged or changed checkpoint is refused before anything is loaded or written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffengine import cli
from diffengine.engine import checkpoint
from diffengine.engine.state import TYPES, differences, state_after_a_step
from tests.engine.conftest import REFERENCE
from tests.engine.runs import Toy, train


def set_first_moment(state: dict[str, Any], value: Any) -> None:
    state["optimizer"]["state"][0]["exp_avg"] = value


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "moment too small": (lambda s: set_first_moment(s, torch.zeros(1)), "state.0.exp_avg is (1,) float32; expected"),
    "moment of integers": (
        lambda s: set_first_moment(s, s["optimizer"]["state"][0]["exp_avg"].long()),
        "int64; expected",
    ),
    "moment is a string": (lambda s: set_first_moment(s, "x"), "optimizer.state.0.exp_avg is str; expected"),
    "moment missing": (lambda s: s["optimizer"]["state"][0].pop("exp_avg"), "optimizer.state.0 has"),
    "unknown parameter": (lambda s: s["optimizer"]["state"].update({10**9: {}}), "state has 1000000000"),
    "step count of Adam": (lambda s: s["optimizer"]["state"][0]["step"].fill_(1e9), "state.0.step is 1e+09"),
    "missing group": (lambda s: s["optimizer"]["param_groups"].pop(), "has not the 2 param_groups"),
    "missing parameter": (
        lambda s: s["optimizer"]["param_groups"][0]["params"].pop(),
        "param_groups.0 is not of the",
    ),
    "rate is a string": (lambda s: s["optimizer"]["param_groups"][0].update(lr="x"), "param_groups.0.lr is str"),
    "rate is NaN": (
        lambda s: s["optimizer"]["param_groups"][0].update(lr=float("nan")),
        "param_groups.0.lr is nan; expected a finite number",
    ),
    "negative steps": (lambda s: s["counters"].update(iter=-5), "expected 'iter' of at least 0"),
    "too many steps": (lambda s: s["counters"].update(iter=10**9), "counters.iter is 1000000000; expected 0"),
    "steps are a string": (lambda s: s["counters"].update(iter="4"), "expected 'iter' of at least 0"),
    "epoch too high": (lambda s: s["counters"].update(epoch=99), "counters.epoch is 99; expected 0 to 1 after 4 steps"),
    "step count of the schedule": (lambda s: s["param_scheduler"].update(last_epoch=3), "last_epoch is 3; expected 4"),
    "missing rate of the schedule": (lambda s: s["param_scheduler"].update(base_lrs=[1.0]), "expected 2 entries"),
    "no optimizer": (lambda s: s.pop("optimizer"), "'optimizer' is missing; expected dict"),
    "num_samples is a list": (lambda s: s.update(num_samples=[10]), "'num_samples' is list; expected int"),
    "assets hold a number": (lambda s: s.update(assets={"a": 1}), "'assets' holds more than texts"),
    "average without weights": (lambda s: s.update(ema={"updates": 1, "weights": {}}), "ema.weights has []; expected"),
    "micro-batch of 0": (
        lambda s: s.update(micro_batch_size={"asked": None, "found": 0}),
        "'found' from 1 to 4",
    ),
    "micro-batch without 'asked'": (
        lambda s: s.update(micro_batch_size={"found": 2}),
        "micro_batch_size is {'found': 2}; expected 'asked', and 'found' from 1 to 4",
    ),
    "line without its columns": (lambda s: s["metrics"].update(widths=None), "metrics.widths is None; expected"),
    "line of a step without its numbers": (
        lambda s: s["metrics"].update(counts=[[1.0] * 4]),
        "metrics.rows is (3, 16) float32; expected (1, 16) float32",
    ),
    "line of minus infinity seconds": (lambda s: s["metrics"].update(seconds=float("-inf")), "metrics.seconds is -inf"),
    "weight of integers": (
        lambda s: s["model"].update({key: value.long() for key, value in s["model"].items()}),
        ") int64, expected (",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_checkpoint_is_refused(
    toy: Toy, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    """Without the check, a moment of the wrong size crashes the fused optimizer step."""
    change, expected = CHANGES[name]
    state = checkpoint.read(sorted(reference.glob("iter_*.pth"))[-1])
    steps = 4
    state["counters"] = {"iter": steps, "epoch": 1}
    state["param_scheduler"]["last_epoch"] = steps
    for values in state["optimizer"]["state"].values():
        values["step"] = torch.tensor(float(steps))
    change(state)
    checkpoint.write(tmp_path / "iter_4.pth", state)
    before = (tmp_path / "iter_4.pth").read_bytes()
    assert train(toy.config("reference", **REFERENCE), tmp_path, "--resume") == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert printed.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["iter_4.pth"]
    assert (tmp_path / "iter_4.pth").read_bytes() == before


def without_section(state: dict[str, Any], name: str) -> str:
    """The checkpoint's config without one of its entries."""
    return json.dumps({key: value for key, value in json.loads(state["config"]).items() if key != name})


ENTRIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{f"no {name}": (lambda s, name=name: s.pop(name), f"'{name}' is missing; expected ") for name in TYPES},
    **{f"{name} is None": (lambda s, name=name: s.update({name: None}), f"'{name}' is NoneType") for name in TYPES},
    "model is a tensor": (lambda s: s.update(model=torch.ones(2)), "'model' is (2,) float32; expected dict"),
    "config is no JSON": (lambda s: s.update(config="{"), "'config' is not the JSON of a config"),
    "config is a list": (lambda s: s.update(config="[]"), "'config' is not the JSON of a config"),
    "config has no model": (lambda s: s.update(config=without_section(s, "model")), "with a model and a seed"),
    "config has no seed": (lambda s: s.update(config=without_section(s, "seed")), "with a model and a seed"),
    "assets hold a number": (lambda s: s.update(assets={"a": 1}), "'assets' holds more than texts"),
    "average is a number": (lambda s: s.update(ema=1), "'ema' holds no weights by name"),
    "average has no weights": (lambda s: s.update(ema={"updates": 1}), "'ema' holds no weights by name"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_checkpoint_without_its_entries_is_refused_by_every_command(
    toy: Toy, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    change, expected = ENTRIES[name]
    state = checkpoint.read(reference / "iter_12.pth")
    change(state)
    path = tmp_path / "iter_12.pth"
    checkpoint.write(path, state)
    config = toy.config("reference", **REFERENCE)
    resume = ["--work-dir", str(tmp_path / "new"), "--resume", str(path)]
    commands = [
        ["convert", config, str(path), str(tmp_path / "out")],
        ["convert", config, str(path), str(tmp_path / "out"), "--ema"],
        ["convert", str(tmp_path)],
        ["sample", str(path), "a cat"],
        ["sample", str(tmp_path), "a cat"],
        ["train", config, *resume],
    ]
    for command in commands:
        assert cli.main(command) == 2
        printed = capsys.readouterr().err
        counters = "counters" in name and "got counters None; expected 'iter' of at least 0" in printed
        assert expected in printed or counters
        assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "new").iterdir()) == []


def test_an_unchanged_checkpoint_is_accepted(toy: Toy, reference: Path, tmp_path: Path) -> None:
    """The state that the cases above start from is valid."""
    state = checkpoint.read(sorted(reference.glob("iter_*.pth"))[-1])
    state["counters"] = {"iter": 4, "epoch": 1}
    state["param_scheduler"]["last_epoch"] = 4
    checkpoint.write(tmp_path / "iter_4.pth", state)
    assert train(toy.config("reference", **{**REFERENCE, "max_iters": 5}), tmp_path, "--resume") == 2
    for values in state["optimizer"]["state"].values():
        values["step"] = torch.tensor(4.0)
    checkpoint.write(tmp_path / "iter_4.pth", state)
    assert train(toy.config("reference", **{**REFERENCE, "max_iters": 5}), tmp_path, "--resume") == 0


@pytest.mark.parametrize(
    "options",
    [
        {"type": "torch.optim.SGD", "lr": 1e-3},
        {"type": "torch.optim.SGD", "lr": 1e-3, "momentum": 0.9},
        {"type": "torch.optim.AdamW", "lr": 1e-3, "amsgrad": True},
        {"type": "lion_pytorch.Lion", "lr": 1e-4},
        {"type": "transformers.optimization.Adafactor", "lr": 1e-3, "relative_step": False},
        {"type": "bitsandbytes.optim.AdamW8bit", "lr": 1e-3},
    ],
)
def test_the_state_of_any_optimizer_is_compared(options: dict[str, Any]) -> None:
    """Two parameters of one shape have equal state layouts; two shapes have different ones."""
    large, small = torch.ones(64, 80), torch.ones(7)
    state = state_after_a_step(large, options)
    assert differences(state, state_after_a_step(large, options), "state", steps=1) == []
    if state and state != {"momentum_buffer": None}:
        assert differences(state_after_a_step(small, options), state, "state") != []
