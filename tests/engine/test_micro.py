"""If memory runs out, all ranks halve the micro-batch, and the step stays the same."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

from diffengine import distributed
from diffengine.engine import checkpoint
from diffengine.engine.micro import MicroBatches, too_large
from diffengine.errors import UserError
from tests.engine import runs
from tests.engine.runs import WITH_TEXT_ENCODER, FirstStep, Toy, assert_equal_checkpoints, train
from tests.engine.test_split import TOLERANCE, assert_same_step, flatten

OOM_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 GiB "
    "is free. Including non-PyTorch memory, this process has 77 GiB memory in use."
)


class MemoryLimit(Hook):
    """Lets a pass over more than `most` images run out of memory.

    Args:
        most: how many images fit.
        where: the name of the module whose forward pass fails, or "backward".
        rank: the only rank that fails.
        since: how many steps succeed first.

    Attributes:
        sizes: the number of images in each pass.
    """

    def __init__(self, most: int, where: str = "transformer.project_to_hidden", rank: int = 0, since: int = 0) -> None:
        self.most, self.where, self.rank, self.since = most, where, rank, since
        self.sizes: list[int] = []

    def before_train(self, runner: Any) -> None:
        if distributed.rank() != self.rank:
            return

        def check(count: int) -> None:
            if runner.clock.done == runner.train_loop.max_iters:
                return  # after training, the export runs the model too
            self.sizes.append(count)
            if count > self.most and runner.clock.done >= self.since:
                raise torch.OutOfMemoryError(OOM_MESSAGE)

        if self.where == "backward":

            def check_in_backward(module: nn.Module, args: Any, output: tuple) -> None:
                rows = self._rows
                output[0].register_hook(lambda grad: check(rows))

            runner.trainable.register_forward_pre_hook(self._count_rows)
            runner.trainable.register_forward_hook(check_in_backward)
        else:
            module = runner.trainable.get_submodule(self.where)
            module.register_forward_pre_hook(lambda module, args: check(len(args[0])))

    def _count_rows(self, module: nn.Module, args: tuple) -> None:
        self._rows = len(args[0].get("token_ids", args[0].get("image")))


def memory_limit(most: int, **options: Any) -> str:
    """The config option that adds a `MemoryLimit` hook."""
    return f"custom_hooks={[{'type': 'tests.engine.test_micro.MemoryLimit', 'most': most, **options}]}"


@pytest.fixture(scope="module")
def whole(toy: Toy) -> FirstStep:
    """The first step of a run that does not split it."""
    return runs.first_step(toy.config("unlimited", batch_size=8), toy.root / "unlimited", WITH_TEXT_ENCODER)


@pytest.mark.parametrize(("most", "where", "sizes"), [
    (5, "transformer.project_to_hidden", [8, 4, 4]),
    (1, "transformer.project_to_hidden", [8, 4, 2, *[1] * 8]),
    (3, "backward", [8, 4, *[2] * 4]),
    (3, "text_encoder.text_projection", [8, 4, *[2] * 4]),
])  # fmt: skip
def test_the_micro_batch_is_halved_and_the_step_is_the_same(
    toy: Toy, whole: FirstStep, tmp_path: Path, most: int, where: str, sizes: list[int]
) -> None:
    runner = runs.build(
        toy.config("limited", batch_size=8), tmp_path, WITH_TEXT_ENCODER, memory_limit(most, where=where)
    )
    hook = runs.FirstStepHook()
    runner.register_hook(hook)
    runner.train()
    (limit,) = [item for item in runner.hooks if isinstance(item, MemoryLimit)]
    assert limit.sizes == sizes
    assert hook.step is not None
    hook.step.read_line(tmp_path)
    assert_same_step(whole, hook.step)
    log = (tmp_path / "log.txt").read_text().splitlines()
    messages = [line.partition("out of memory ")[2] for line in log if "out of memory" in line]
    tried = [size for size in (8, 4, 2, 1) if size in sizes]
    assert messages == [
        f"with {before} images at a time: step 1 is taken again with {after}, and so are all after it "
        "(micro_batch_size)"
        for before, after in itertools.pairwise(tried)
    ]


def test_a_resumed_run_keeps_the_micro_batch_size(toy: Toy, tmp_path: Path) -> None:
    settings = {"batch_size": 8, "checkpoint_every": 1, "keep_checkpoints": None, "max_iters": 3}
    path, option = toy.config("kept", **settings), memory_limit(2)
    runner = runs.build(path, tmp_path / "one", option)
    runner.train()
    found = {"asked": None, "found": 2}
    assert checkpoint.read(tmp_path / "one" / "iter_1.pth")["micro_batch_size"] == found

    other = tmp_path / "other"
    runner = runs.build(path, other, option, resume=tmp_path / "one" / "iter_1.pth")
    runner.train()
    (limit,) = [item for item in runner.hooks if isinstance(item, MemoryLimit)]
    assert limit.sizes == [2] * 8  # the search is not repeated
    assert checkpoint.read(other / "iter_3.pth")["micro_batch_size"] == found
    assert_equal_checkpoints(other / "iter_3.pth", tmp_path / "one" / "iter_3.pth")

    changed = runs.build(path, tmp_path / "three", option, "micro_batch_size=4", resume=other / "iter_3.pth")
    assert changed.train_loop.micro.size == 4  # an explicit size takes precedence
    assert train(toy.config("fits", **settings), tmp_path / "fits") == 0
    assert "micro_batch_size" not in checkpoint.read(tmp_path / "fits" / "iter_3.pth")


def test_one_image_does_not_fit(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = toy.config("none", batch_size=3)
    assert train(path, tmp_path, "--cfg-options", memory_limit(0)) == 2
    error = capsys.readouterr().err
    assert error == (
        "diffengine train: error: even one image at a time does not fit into memory (CUDA out of memory. "
        "Tried to allocate 2.00 GiB): set --cfg-options model.gradient_checkpointing=True, take an 8-bit optimizer "
        "(bitsandbytes.optim.AdamW8bit), or train adapters (a config whose name ends in _lora)\n"
    )
    assert not list(tmp_path.glob("*.pth"))


def test_the_error_reports_the_memory_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1e9, 24e9))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 21e9)
    assert "; 21.00 GB were in use at most, the GPU has 24.00 GB (1.00 GB free): set" in str(
        too_large("it does", OOM_MESSAGE)
    )


def test_the_optimizer_state_does_not_fit(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runs.build(toy.config("state"), tmp_path)

    def step(**kwargs: Any) -> None:
        raise torch.OutOfMemoryError(OOM_MESSAGE)

    monkeypatch.setattr(runner.optim_wrapper, "step", step)
    with pytest.raises(UserError, match="the optimizer's state does not fit into memory"):
        runner.train()


def test_a_failed_try_does_not_change_buffers(toy: Toy, tmp_path: Path) -> None:
    """The VQ model counts its codes in a buffer: a try that fails has counted some of them already."""
    states = []
    for name, hooks in (("failing", [memory_limit(1, where="backward")]), ("alone", [])):
        path = toy.vq_config(name, 4, 4)
        options = ["train_cfg.micro_batch_size=" + ("4" if hooks else "1")]
        runner = runs.build(path, tmp_path / name, *hooks, *options)
        runner.train()
        states.append(runner.trainable.trained_state())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert states[0]["usage"].sum() > 0


@pytest.mark.parametrize(
    ("batch_size", "asked", "sizes"),
    [(8, None, [8, 4, 2, 1]), (8, 3, [3, 2, 1]), (6, None, [6, 3, 2, 1]), (1, None, [1]), (5, 1, [1])],
)
def test_micro_batch_sizes(batch_size: int, asked: int | None, sizes: list[int]) -> None:
    micro = MicroBatches(batch_size, asked)
    found = [micro.size]
    while micro.halve():
        found.append(micro.size)
    assert found == sizes
    assert not micro.halve()


def test_uneven_shares_are_split_into_equally_many_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 samples, two ranks take 2 and 3: at most two micro-batches each, of at most two samples."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    micro = MicroBatches(5, None)
    assert (micro.size, micro.halve(), micro.count, micro.size, micro.halve()) == (3, True, 2, 2, False)
    assert str(micro.too_large("")).startswith("2 images, the fewest at a time, do not fit into memory")
    again = MicroBatches(5, None)
    again.restore({"asked": None, "found": 1})  # as found by one rank
    assert again.count == 2


def _train_on_rank(toy: Toy, out: Path) -> None:
    rank = distributed.rank()
    results: dict[str, Any] = {}
    results["step"] = vars(
        runs.first_step(
            toy.config(f"over{rank}", batch_size=8), out / "over", WITH_TEXT_ENCODER, memory_limit(1, rank=1)
        )
    )
    for name, limit, settings in (
        ("none", memory_limit(0, rank=1), {}),
        ("late", memory_limit(1, rank=1, since=3), {"max_iters": 6}),
    ):
        try:
            runs.build(toy.config(f"{name}{rank}", batch_size=8, **settings), out / name, limit).train()
        except (UserError, RuntimeError) as error:
            results[name] = f"{type(error).__name__}: {error}"
    torch.save(results, out / f"rank{rank}.pt")


def test_all_ranks_halve_if_one_runs_out_of_memory(toy: Toy, whole: FirstStep, tmp_path: Path) -> None:
    runs.on_ranks(2, _train_on_rank, toy, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    first, second = (FirstStep(**rank["step"]) for rank in ranks)
    for one, other in zip(first.grads, second.grads):
        assert torch.equal(one, other)
    assert first.masked + second.masked == whole.masked
    assert first.loss == pytest.approx(whole.loss, rel=1e-6)
    a, b = flatten(whole.grads), flatten(first.grads)
    assert float((a - b).norm()) <= TOLERANCE * float(a.norm())
    log = (tmp_path / "over" / "log.txt").read_text()
    assert log.count("out of memory with") == 2  # 4 to 2, 2 to 1
    assert ranks[0]["none"].startswith("PeerError: even one image at a time does not fit")
    assert ranks[1]["late"] == (
        "UserError: process 1 ran out of memory in step 4 (CUDA out of memory. Tried to allocate 2.00 GiB), "
        "after 4 images at a time had fitted; continue with --resume --cfg-options micro_batch_size=2"
    )
    assert ranks[0]["late"].startswith("RuntimeError")  # the other rank has ended, which ends this one
    assert ranks[1]["none"].startswith("UserError: even one image at a time does not fit")
