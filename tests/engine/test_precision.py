"""The precision of a run: what is chosen and why, and weights that are cast once per step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffengine.engine import checkpoint, memory, precision
from diffengine.engine.optim import build_optim_wrapper
from diffengine.engine.precision import FEWEST_PASSES, TOO_SHORT, measure, resolve_precision
from diffengine.errors import UserError
from diffengine.models.frozen import CAST
from diffengine.models.vq import VQTokenizerModel
from tests.engine import runs
from tests.engine.runs import CPU, WITH_TEXT_ENCODER, Toy, assert_equal_checkpoints, train
from tests.models.test_adapters import LORA

ADAPTER = ["model.train=[]", f"model.adapters={{'transformer': {LORA!r}}}"]
AUTO = {"precision": "auto", "max_iters": FEWEST_PASSES}


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that has bf16."""
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The precisions of the passes that are timed; those in bf16 count as twice as fast."""
    taken: list[str] = []
    time_pass = precision._time_pass

    def timed(model: Any, optim: Any, *args: Any) -> float:
        time_pass(model, optim, *args)
        taken.append(optim.precision)
        return 1.0 if optim.precision == "bf16" else 2.0

    monkeypatch.setattr(precision, "_time_pass", timed)
    return taken


@pytest.mark.parametrize(
    ("wanted", "kept", "has", "expected"),
    [
        ("bf16", None, False, ("bf16", "as configured")),
        ("fp32", "bf16", True, ("fp32", "as configured")),
        ("auto", None, False, ("fp32", "auto, on a CPU without bf16")),
        ("auto", None, True, ("fp32", TOO_SHORT)),
        ("auto", "fp32", True, ("fp32", "auto, as the run began")),
        ("auto", "bf16", True, ("bf16", "auto, as the run began")),
        ("auto", "bf16", False, ("bf16", "auto, as the run began; this CPU has no bf16, so steps are slow")),
        ("auto", "fp16", False, ("fp32", "auto, on a CPU without bf16")),
    ],
)
def test_precision_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, wanted: Any, kept: str | None, has: bool, expected: tuple[str, str]
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: has)
    assert resolve_precision(wanted, CPU, kept) == expected


def test_fp16_on_a_cpu_is_refused(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="precision got 'fp16' on a CPU"):
        resolve_precision("fp16", CPU)
    assert train(toy.config("half", precision="fp16"), tmp_path) == 2
    assert not list(tmp_path.iterdir())
    assert resolve_precision("fp16", torch.device("cuda")) == ("fp16", "as configured")


@pytest.mark.usefixtures("bf16")
def test_a_short_run_is_not_measured(toy: Toy, tmp_path: Path, passes: list[str]) -> None:
    run = runs.build(toy.config("short", precision="auto", max_iters=FEWEST_PASSES - 1), tmp_path / "short")
    assert (run.precision, passes) == (f"fp32 ({TOO_SHORT})", [])
    runs.build(toy.config("split", precision="auto", max_iters=FEWEST_PASSES // 2), tmp_path / "split",
               "micro_batch_size=2")  # fmt: skip
    assert passes[:2] == ["fp32", "bf16"]


@pytest.mark.usefixtures("bf16")
def test_what_is_faster_is_chosen_and_kept(
    toy: Toy, tmp_path: Path, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to a run that was configured so: the measurement leaves no trace. A resumed run does not measure."""
    settings = {"max_iters": 10 * FEWEST_PASSES, "checkpoint_every": 1}
    run = runs.build(toy.config("auto", precision="auto", **settings), tmp_path / "auto")
    assert run.precision == "bf16 (auto, measured: 2 s in fp32, 1 s in bf16)"
    assert passes == ["fp32", "bf16"] * 4
    run.train(steps=2)
    configured = runs.build(toy.config("bf16", precision="bf16", **settings), tmp_path / "bf16")
    configured.train(steps=2)
    files = [work_dir / "iter_2.pth" for work_dir in (tmp_path / "auto", tmp_path / "bf16")]
    assert_equal_checkpoints(*files)
    assert [checkpoint.read(file)["precision"] for file in files] == ["bf16", "bf16"]
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    resumed = runs.build(toy.config("auto", precision="auto", **settings), tmp_path / "auto", resume=files[0])
    assert resumed.precision == "bf16 (auto, as the run began; this CPU has no bf16, so steps are slow)"
    assert len(passes) == 8


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("adapter", [False, True])
def test_a_measurement_that_finds_fp32_leaves_no_trace(
    toy: Toy, tmp_path: Path, adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "PAYS_FROM", 1e9)
    monkeypatch.setattr(precision, "LARGEST_SHARE", 1.0)
    options = ADAPTER if adapter else []
    fp32 = runs.build(toy.config("fp32", precision="fp32", max_iters=FEWEST_PASSES), tmp_path / "fp32", *options)
    auto = runs.build(toy.config("auto", **AUTO), tmp_path / "auto", *options)
    assert auto.precision.startswith("fp32 (auto, measured: ")
    model = auto.trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.module("text_encoder").parameters()} == {torch.float32}
    assert memory.nbytes(auto.optim_wrapper.copies.tensors) == 0
    for run in (fp32, auto):
        run.train(steps=1)
    runs.assert_equal(*(run.trainable.state_dict() for run in (auto, fp32)))


@pytest.mark.usefixtures("bf16")
def test_an_adapters_base_is_held_in_what_is_chosen(toy: Toy, tmp_path: Path, passes: list[str]) -> None:

    settings = {"max_iters": 10 * FEWEST_PASSES}
    auto = runs.build(toy.config("auto", precision="auto", **settings), tmp_path / "auto", *ADAPTER)
    bf16 = runs.build(toy.config("bf16", precision="bf16", **settings), tmp_path / "bf16", *ADAPTER)
    runs.assert_equal(auto.trainable.state_dict(), bf16.trainable.state_dict())
    for run in (auto, bf16):
        run.train(steps=1)
    runs.assert_equal(auto.trainable.state_dict(), bf16.trainable.state_dict())


def test_a_measurement_ends_when_it_costs_too_much(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and buffers that a pass changes are restored."""
    run = runs.build(toy.vq_config("vq", 2, 1), tmp_path)
    model, optim, taken = run.trainable, run.optim_wrapper, []
    assert isinstance(model, VQTokenizerModel)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def slow_in_bf16(model: Any, optim: Any, *args: Any) -> float:
        taken.append(optim.precision)
        model.usage.add_(1)
        torch.rand(1)
        with torch.no_grad():
            next(model.parameters()).add_(1)
        return {"fp32": 1.0, "bf16": 50.0}[optim.precision]

    monkeypatch.setattr(precision, "_time_pass", slow_in_bf16)
    batch = {"image": torch.rand(2, 3, 32, 32), "num_targets": [1, 1]}
    generator = torch.get_rng_state()
    assert measure(model, optim, batch, 0, 5000) == ("fp32", TOO_SHORT)
    assert taken == ["fp32", "bf16"]
    assert measure(model, optim, batch, 0, 5200) == ("fp32", "auto, measured: 1 s in fp32, 50 s in bf16")
    assert len(taken) == 2 + 8
    assert torch.equal(torch.get_rng_state(), generator)
    runs.assert_equal(dict(model.state_dict()), before)


class Casts(TorchDispatchMode):
    """Counts casts of each parameter."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.layers = [layer for layer in model.modules() if isinstance(layer, CAST)]
        self.counts = {id(item): 0 for layer in self.layers for item in layer._parameters.values() if item is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and id(args[0]) in self.counts:
            self.counts[id(args[0])] += 1
        return func(*args, **(kwargs or {}))


EXACT = {
    "full": [],
    "text encoder": [WITH_TEXT_ENCODER],
    "checkpointing": [WITH_TEXT_ENCODER, "model.gradient_checkpointing=True"],
    "adapter": [*ADAPTER, "model.gradient_checkpointing=True"],
}


@pytest.mark.parametrize("way", EXACT)
def test_cast_once_is_autocast_bit_for_bit(toy: Toy, tmp_path: Path, way: str) -> None:
    """Two steps in two micro-batches. An adapter's weights are cast at each use."""
    path = toy.config("cast", precision="bf16", max_iters=2, checkpoint_every=2)
    casts = {}
    for once in ("auto", "False"):
        run = runs.build(path, tmp_path / once, "micro_batch_size=2", f"optim_wrapper.cast_once={once}", *EXACT[way])
        with Casts(run.trainable) as casts[once]:
            run.train(steps=1)
        copies = run.optim_wrapper.copies
        assert (copies is None) == (once == "False")
        held = {} if copies is None else {id(weight) for *_, weight in copies._slots}
        assert run.memory()["copies"] == sum(2 * p.numel() for p in run.trainable.parameters() if id(p) in held)
        assert not any(name in vars(layer) for layer in casts[once].layers for name in ("weight", "bias"))
        run.train()
    assert_equal_checkpoints(*(tmp_path / once / "iter_2.pth" for once in casts))
    most = {once: max(counted.counts.values()) for once, counted in casts.items()}
    checkpointed = "model.gradient_checkpointing=True" in EXACT[way]
    assert most["False"] == (4 if checkpointed else 2)  # of two micro-batches
    assert most["auto"] == (4 if way == "adapter" else 0)  # `_foreach_copy_` has made them


def _train_on_rank(path: str, root: Path) -> None:
    for once in ("auto", "False"):
        runs.build(path, root / once, "micro_batch_size=1", f"optim_wrapper.cast_once={once}").train()


def test_cast_once_on_two_ranks(toy: Toy, tmp_path: Path) -> None:
    runs.on_ranks(2, _train_on_rank, toy.config("two", precision="bf16", max_iters=2, checkpoint_every=2), tmp_path)
    assert_equal_checkpoints(*(tmp_path / once / "iter_2.pth" for once in ("auto", "False")))


def _measure_on_rank(path: str, root: Path) -> None:
    slow = torch.distributed.get_rank()
    precision.cpu_has_bf16 = lambda: True  # type: ignore[assignment]
    time_pass = precision._time_pass

    def timed(model: Any, optim: Any, *args: Any) -> float:
        time_pass(model, optim, *args)
        return 1.0 if (optim.precision == "bf16") != slow else 2.0  # rank 1 would choose fp32

    precision._time_pass = timed
    assert runs.build(path, root).precision == "bf16 (auto, measured: 2 s in fp32, 1 s in bf16)"


def test_rank_0_decides(toy: Toy, tmp_path: Path) -> None:
    runs.on_ranks(2, _measure_on_rank, toy.config("ranks", precision="auto", max_iters=5000), tmp_path)


def test_a_preview_uses_the_copies_and_leaves_none(toy: Toy, tmp_path: Path) -> None:
    """Without gradients, and of the average: the next step still has the gradients of all weights."""
    run = runs.build(toy.config("preview", precision="bf16", max_iters=3), tmp_path)
    weight = run.trainable.transformer.mlm_layer.conv2.weight
    layer, before = run.trainable.transformer.mlm_layer.conv2, weight.detach().clone()
    run.average = {"transformer.mlm_layer.conv2.weight": before + 1}
    optim = run.optim_wrapper
    with torch.no_grad(), run.averaged_weights(), optim.cast_weights():
        assert torch.equal(layer.weight, (before + 1).bfloat16())
    assert layer.weight is weight
    assert torch.equal(weight, before)
    run.train(steps=1)
    assert all(parameter in optim.optimizer.state for parameter in optim.parameters)
    assert not torch.equal(weight, before)


@pytest.mark.parametrize(("memory_of_device", "copied"), [(16 * 2 * 8, True), (16 * 2 * 8 - 1, False)])
def test_copies_need_memory(monkeypatch: pytest.MonkeyPatch, memory_of_device: int, copied: bool) -> None:
    monkeypatch.setattr("diffengine.engine.optim.device_memory", lambda: memory_of_device)
    model: Any = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
    model.gradient_group = lambda name: name
    built = {
        once: build_optim_wrapper({"type": "torch.optim.AdamW"}, "bf16", cast_once=once, model=model).copies is not None
        for once in ("auto", True, False)
    }
    assert built == {"auto": copied, True: True, False: False}
