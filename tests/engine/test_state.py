"""A damaged or changed checkpoint is refused before anything is loaded or written."""

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffengine import cli
from diffengine.api import load_sampler
from diffengine.engine import checkpoint
from diffengine.engine.state import (
    TYPES,
    differences,
    load_model,
    model_of,
    read_whole,
    scaler_problems,
    state_after_a_step,
    trusted_config,
)
from diffengine.errors import UserError
from tests.engine.conftest import REFERENCE
from tests.engine.runs import Toy, assert_equal_checkpoints, train


def set_first_moment(state: dict[str, Any], value: Any) -> None:
    state["optimizer"]["state"][0]["exp_avg"] = value


def set_rate(state: dict[str, Any], value: float) -> None:
    state["optimizer"]["param_groups"][0]["lr"] = value


def first_moment(state: dict[str, Any]) -> torch.Tensor:
    return state["optimizer"]["state"][0]["exp_avg"]


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
    "steps are true": (lambda s: s["counters"].update(iter=True), "expected 'iter' of at least 0"),
    "steps are a fraction": (lambda s: s["counters"].update(iter=4.0), "expected 'iter' of at least 0"),
    "epoch is true": (lambda s: s["counters"].update(epoch=True), "counters.epoch is True; expected a whole number"),
    "no epoch": (lambda s: s["counters"].pop("epoch"), "counters.epoch is None; expected a whole number"),
    "too many steps": (lambda s: s["counters"].update(iter=10**9), "counters.iter is 1000000000; expected 0"),
    "steps are a string": (lambda s: s["counters"].update(iter="4"), "expected 'iter' of at least 0"),
    "epoch too high": (lambda s: s["counters"].update(epoch=99), "counters.epoch is 99; expected 0 to 1 after 4 steps"),
    "step count of the schedule": (lambda s: s["param_scheduler"].update(last_epoch=3), "last_epoch is 3; expected 4"),
    "missing rate of the schedule": (lambda s: s["param_scheduler"].update(base_lrs=[1.0]), "expected 2 entries"),
    "betas": (
        lambda s: s["optimizer"]["param_groups"][0].update(betas=(5.0, 5.0)),
        "param_groups.0.betas is (5.0, 5.0); expected (0.9, 0.999), as in the config",
    ),
    "weight decay": (
        lambda s: s["optimizer"]["param_groups"][1].update(weight_decay=-1.0),
        "param_groups.1.weight_decay is -1.0; expected 0.0, as in the config",
    ),
    "negative rate": (lambda s: set_rate(s, -1.0), "param_groups.0.lr is -1.0; expected 0 to 0.001"),
    "high rate": (lambda s: set_rate(s, 1e9), "param_groups.0.lr is 1000000000.0; expected 0 to 0.001"),
    "moment is infinite": (
        lambda s: s["optimizer"]["state"][0]["exp_avg"].view(-1)[-1:].fill_(float("inf")),
        "optimizer.state.0.exp_avg is not finite",
    ),
    "moment laid out in another way": (
        lambda s: set_first_moment(s, s["optimizer"]["state"][0]["exp_avg"].view(-1)[:1].expand_as(first_moment(s))),
        "optimizer.state.0.exp_avg has the strides",
    ),
    "step count is not a number": (
        lambda s: s["optimizer"]["state"][0]["step"].fill_(float("nan")),
        "optimizer.state.0.step is not finite",
    ),
    "step count has a shape": (
        lambda s: s["optimizer"]["state"][0].update(step=torch.zeros(3)),
        "optimizer.state.0.step is (3,) float32; expected () float32",
    ),
    "another optimizer's state": (
        lambda s: s["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(1)),
        "optimizer.state.0 has ['exp_avg', 'exp_avg_sq', 'momentum_buffer', 'step']; expected",
    ),
    "average of NaN": (
        lambda s: s.update(ema={"updates": 1, "weights": {"a": torch.tensor(float("nan"))}}),
        "a holds values that are not finite",
    ),
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
    "weight of bytes": (lambda s: s["model"].update({b"x": torch.zeros(1)}), "weights are not all named by texts"),
    "config of a thousand levels": (
        lambda s: s.update(config=s["config"].replace('"model": {', '"model": {"x":' + "[" * 900 + "]" * 900 + ",", 1)),
        "'config' is not the JSON of a config with a model and a seed",
    ),
    "config of endless levels": (
        lambda s: s.update(config='{"model": ' + "[" * 10**5), "'config' is not the JSON of a config with a model"
    ),
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


def first_weight(state: dict[str, Any]) -> torch.Tensor:
    return next(iter(state["model"].values()))


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
    "weight is NaN": (lambda s: first_weight(s).view(-1)[-1:].fill_(float("nan")), "holds values that are not finite"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_checkpoint_without_its_entries_is_refused(reference: Path, tmp_path: Path, name: str) -> None:
    change, expected = ENTRIES[name]
    state = checkpoint.read(reference / "iter_12.pth")
    change(state)
    checkpoint.write(tmp_path / "changed.pth", state)
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        read_whole(tmp_path / "changed.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no counters", "no config", "average has no weights", "weight is NaN"])
def test_every_command_refuses_a_checkpoint_without_its_entries(
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
        assert expected in printed or "got counters None; expected 'iter' of at least 0" in printed
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


ODD_TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse": lambda weight: weight.to_sparse(),
    "meta": lambda weight: weight.to("meta"),
    "parameter": lambda weight: torch.nn.Parameter(weight.clone()),
    "trained": lambda weight: weight.clone().requires_grad_(),
    "float8": lambda weight: weight.to(torch.float8_e4m3fn),
    "quantized": lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
}


def test_an_average_of_some_weights_is_refused(reference: Path, tmp_path: Path) -> None:
    state = read_whole(reference / "iter_12.pth")
    name, *_ = state["model"]
    average = {key: value for key, value in state["model"].items() if key != name}
    checkpoint.write(tmp_path / "iter_12.pth", {**state, "ema": {"updates": 12, "weights": average}})
    with pytest.raises(UserError, match=f"keeps no average of {name}; leave out --ema$"):
        load_model(tmp_path / "iter_12.pth", average=True)


def test_an_entry_is_not_listed_twice(reference: Path, tmp_path: Path) -> None:
    """A few bytes each would have it read again and again."""
    path = Path(shutil.copy(reference / "iter_12.pth", tmp_path))
    with zipfile.ZipFile(path, "a") as file:
        file.filelist += [max(file.filelist, key=lambda item: item.file_size)] * 1000
        file._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="is no checkpoint of diffengine"):
        read_whole(path)


def test_a_checkpoint_does_not_set_what_the_run_gives(reference: Path) -> None:
    state = read_whole(reference / "iter_12.pth")
    resolved = trusted_config(state, None, "it")
    resolved["model"]["seed"] = 3
    with pytest.raises(UserError, match=r"^it holds a config that builds no model: model: unknown key 'seed'"):
        model_of(state, resolved, "it")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", ODD_TENSORS)
def test_tensors_that_no_kernel_expects_are_refused(reference: Path, tmp_path: Path, name: str) -> None:
    state = checkpoint.read(reference / "iter_12.pth")
    key = next(iter(state["model"]))
    state["model"][key] = ODD_TENSORS[name](state["model"][key])
    torch.save(state, tmp_path / "iter_12.pth")
    quantized = "is broken or cut off"  # torch does not map it
    with pytest.raises(
        UserError, match=quantized if name == "quantized" else "of .* that is not dense or holds no val"
    ):
        checkpoint.read(tmp_path / "iter_12.pth")


def test_a_few_bytes_do_not_unfold_to_endless_values(tmp_path: Path) -> None:
    value: list = []
    for _ in range(40):
        value = [value] * 2  # the same list twice: 2**40 values
    torch.save({"format": checkpoint.FORMAT, "extra": value}, tmp_path / "iter_1.pth")
    with pytest.raises(UserError, match="is no checkpoint of diffengine"):
        checkpoint.read(tmp_path / "iter_1.pth")


def test_compressed_entries_are_not_unpacked(reference: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(reference / "iter_12.pth") as old, zipfile.ZipFile(tmp_path / "iter_12.pth", "w") as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="is no checkpoint of diffengine"):
        checkpoint.read(tmp_path / "iter_12.pth")


def test_the_options_of_the_config_are_used_after_a_resume(toy: Toy, reference: Path, tmp_path: Path) -> None:
    """A checkpoint without them resumes with the same weights: only what training changes is taken from it."""
    state = checkpoint.read(reference / "iter_8.pth")
    for group in state["optimizer"]["param_groups"]:
        for name in ("betas", "eps", "weight_decay", "initial_lr"):
            del group[name]
    state["param_scheduler"] = {"last_epoch": 8}
    checkpoint.write(tmp_path / "iter_8.pth", state)
    assert train(toy.config("reference", **REFERENCE), tmp_path, "--resume") == 0
    assert_equal_checkpoints(tmp_path / "iter_12.pth", reference / "iter_12.pth")


WRONG_SCALERS: list[dict[str, Any]] = [
    {"scale": -1.0}, {"scale": 0.0}, {"scale": float("nan")}, {"scale": "x"}, {"growth_factor": 9.0},
    {"_growth_tracker": -1}, {"_growth_tracker": 10**9},
]  # fmt: skip


@pytest.mark.parametrize("change", WRONG_SCALERS, ids=str)
def test_a_loss_scaler_is_compared(change: dict[str, Any]) -> None:
    own = torch.amp.GradScaler("cpu").state_dict()
    assert scaler_problems({**own, "scale": 2.0, "_growth_tracker": 7}, own) == []
    (problem,) = scaler_problems({**own, **change}, own)
    assert "scaler" in problem


def test_a_flipped_bit_is_found_by_every_reader(
    toy: Toy, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content = bytearray((reference / "iter_12.pth").read_bytes())
    content[content.index(first_weight(checkpoint.read(reference / "iter_12.pth")).numpy().tobytes())] ^= 1
    path = tmp_path / "iter_12.pth"
    path.write_bytes(content)
    config, new = toy.config("reference", **REFERENCE), ["--work-dir", str(tmp_path / "new")]
    for command in (
        ["convert", config, str(path), str(tmp_path / "out")],
        ["sample", str(path), "a cat"],
        ["eval", str(path), "--prompts", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "eval")],
        ["train", config, *new, "--resume", str(path)],
        ["train", config, *new, "--init-from", str(path)],
    ):
        (tmp_path / "prompts.txt").write_text("a cat")
        assert cli.main(command) == 2, command
        assert "is damaged (in " in capsys.readouterr().err
    for call in (load_sampler, load_model):
        with pytest.raises(UserError, match="is damaged"):
            call(path)


def test_a_damaged_name_in_the_zip_is_one_line(reference: Path, tmp_path: Path) -> None:
    """A local header that says UTF-8 and is not: zipfile raises a UnicodeDecodeError."""
    content = bytearray((reference / "iter_12.pth").read_bytes())
    with zipfile.ZipFile(reference / "iter_12.pth") as file:
        start = file.infolist()[5].header_offset
    content[start + 7] |= 0x08  # the flag of UTF-8
    content[start + 30] = 0xDA
    (tmp_path / "iter_12.pth").write_bytes(content)
    with pytest.raises(UserError, match="is broken or cut off"):
        checkpoint.verify(tmp_path / "iter_12.pth")
