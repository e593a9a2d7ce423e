"""Steps, epochs and checkpoint names; and mmengine's conventions for hooks."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook

from diffengine.engine.clock import Clock
from diffengine.engine.loop import micro_seed
from diffengine.errors import UserError
from tests.engine import runs
from tests.engine.runs import Toy, train


def _clock(size: int, batch_size: int, max_epochs: int | None = None, max_iters: int | None = None) -> Clock:
    return Clock(max_epochs, max_iters, size, batch_size)


def _names(clock: Clock, every: int) -> dict[int, str]:
    """The names of all checkpoints of a run, by step."""
    names = {}
    for done in range(1, clock.max_iters + 1):
        clock.done = done
        if clock.due(every) or clock.finished:
            names[done] = clock.checkpoint_name
    return names


@pytest.mark.parametrize(
    ("size", "batch", "length", "every", "names"),
    [
        (10, 4, {"max_epochs": 3}, 1, {3: "epoch_1", 5: "epoch_2", 8: "epoch_3"}),
        (10, 4, {"max_epochs": 3}, 2, {5: "epoch_2", 8: "epoch_3"}),
        (10, 5, {"max_epochs": 2}, 1, {2: "epoch_1", 4: "epoch_2"}),
        (4, 10, {"max_epochs": 3}, 1, {1: "epoch_2", 2: "epoch_3"}),  # a step longer than an epoch
        (1, 8, {"max_epochs": 4}, 1, {1: "epoch_4"}),
        (10, 4, {"max_iters": 7}, 3, {3: "iter_3", 6: "iter_6", 7: "iter_7"}),
        (10, 4, {"max_iters": 5}, 5, {5: "iter_5"}),
    ],
)
def test_names_and_due(size: int, batch: int, length: dict[str, int], every: int, names: dict[int, str]) -> None:
    assert _names(_clock(size, batch, **length), every) == names


def test_the_pokemon_run_ends_with_epoch_50() -> None:
    clock = _clock(833, 8, max_epochs=50)
    assert clock.max_iters == 5207
    names = _names(clock, 1)
    assert list(names.values()) == [f"epoch_{epoch}" for epoch in range(1, 51)]


def test_nothing_is_due_without_an_interval() -> None:
    clock = _clock(10, 4, max_epochs=1)
    clock.done = 3
    assert not clock.due(None)


@pytest.mark.parametrize("length", [{"max_epochs": 7}, {"max_iters": 17}])
@pytest.mark.parametrize(("size", "batch"), [(10, 4), (10, 5), (4, 10), (1, 8)])
@pytest.mark.parametrize("every", [1, 2, 3, 50, None])
def test_what_is_due_next(size: int, batch: int, length: dict[str, int], every: int | None) -> None:
    clock, due = _clock(size, batch, **length), []
    for done in range(1, clock.max_iters + 1):
        clock.done = done
        if clock.due(every):
            due.append(done)
    for done in range(clock.max_iters):
        clock.done = done
        assert clock.next_due(every) == next((step for step in due if step > done), clock.max_iters)


@pytest.mark.parametrize(
    ("epochs", "iters", "text"),
    [
        (None, None, "expected one of them"),
        (1, 1, "expected one of them"),
        (0, None, "max_epochs got 0"),
        (None, -1, "max_iters got -1"),
    ],
)
def test_invalid_lengths_are_refused(epochs: int | None, iters: int | None, text: str) -> None:
    with pytest.raises(UserError, match=text):
        Clock(epochs, iters, 10, 4)


def test_micro_seeds_differ() -> None:
    """By seed, step, micro-batch and rank."""
    arguments = list(itertools.product((0, 2**64 - 1), (0, 1), (0, 1), (0, 1)))
    assert len({micro_seed(*given) for given in arguments}) == len(arguments)


def test_old_epoch_checkpoints_are_deleted(toy: Toy, tmp_path: Path) -> None:
    path = toy.config("three", max_epochs=3, checkpoint_every=1, keep_checkpoints=2)
    assert train(path, tmp_path) == 0
    assert sorted(file.name for file in tmp_path.glob("*.pth")) == ["epoch_2.pth", "epoch_3.pth"]
    assert [line["iter"] for line in runs.metrics(tmp_path)] == list(range(1, 9))


class MMEngineHook(Hook):
    """A hook that follows mmengine's documentation."""

    def __init__(self) -> None:
        self.log: list[tuple] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.every_n_train_iters(runner, 2):
            self.log.append(("iter", runner.iter))
        if self.is_last_train_iter(runner):
            self.log.append(("last", runner.iter, runner.max_iters))

    def before_train_epoch(self, runner: Any) -> None:
        self.log.append(("begins", runner.epoch))

    def after_train_epoch(self, runner: Any) -> None:
        self.log.append(("ends", runner.epoch, self.every_n_epochs(runner, 2), self.is_last_train_epoch(runner)))

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint["mmengine_hook"] = {"log": [list(item) for item in self.log]}

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        self.log.append(("loaded", len(checkpoint["mmengine_hook"]["log"])))


def test_a_hook_written_for_mmengine_works(toy: Toy, tmp_path: Path) -> None:
    path = toy.config("mmengine_hook", max_epochs=2)
    runner = runs.build(path, tmp_path)
    hook = MMEngineHook()
    runner.register_hook(hook)
    runner.train()
    assert hook.log == [
        ("begins", 0), ("iter", 1), ("ends", 0, False, False),
        ("begins", 1), ("iter", 3), ("last", 4, 5), ("ends", 1, True, True),
    ]  # fmt: skip

    again = runs.build(path, tmp_path, "custom_hooks=[{'type': 'tests.engine.test_loop.MMEngineHook'}]",
                       resume=tmp_path / "epoch_2.pth")  # fmt: skip
    (loaded,) = [hook for hook in again.hooks if isinstance(hook, MMEngineHook)]
    assert loaded.log == [("loaded", 6)]  # the checkpoint was saved before `after_train_epoch`


def test_mmengines_own_resume_is_never_called(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Runner.resume` executes code from a checkpoint's meta; `load_checkpoint` is not strict."""
    from mmengine.runner import Runner

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("mmengine's own checkpoint code ran")

    for name in ("resume", "load_checkpoint", "load_or_resume", "save_checkpoint"):
        monkeypatch.setattr(Runner, name, fail)
    path = toy.config("own_resume", max_iters=2)
    assert train(path, tmp_path) == 0
    assert train(path, tmp_path, "--resume", "--cfg-options", "max_iters=3") == 0


def test_problems_of_mmengines_loop_and_hooks_are_avoided(toy: Toy, tmp_path: Path) -> None:
    """mmengine's loop calls `model.train()` in every iteration, which also switches frozen modules to train mode. Its
    history buffer grows with every step. And without a GPU, each `torch.manual_seed` queues a call with a stack trace.
    """
    runner = runs.build(toy.config("problems", max_iters=3, prompts=1), tmp_path, f"seed={2**32 - 1}")
    assert runner.seed == 2**32 - 1
    queued = len(torch.cuda._queued_calls)
    runner.train()
    assert len(torch.cuda._queued_calls) == queued
    frozen = runner.trainable.build_pipeline()
    for module in (frozen.vqvae, frozen.text_encoder):
        assert not any(child.training for child in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert all(child.training for child in runner.trainable.modules())
    assert not runner.message_hub.log_scalars


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_an_option(toy: Toy, tmp_path: Path, tf32: bool) -> None:
    backends = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = not tf32
        runs.build(toy.config("tf32"), tmp_path, f"train_cfg.tf32={tf32}")
        assert [backend.allow_tf32 for backend in backends] == [tf32, tf32]
    finally:
        for backend, allowed in zip(backends, before):
            backend.allow_tf32 = allowed
