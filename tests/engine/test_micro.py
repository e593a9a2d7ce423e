"""Out of memory, the micro-batch halves on all ranks alike, and the step is the same."""

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
from tests.engine.runs import TEXT_TOO, FirstStep, Toy, assert_equal_checkpoints, train
from tests.engine.test_split import TOLERANCE, _flat, _same_step

TORCH_SAYS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 GiB "
    "is free. Including non-PyTorch memory, this process has 77 GiB memory in use."
)


class Limit(Hook):
    """A memory that holds activations of `most` images: the forward or backward pass of more of them fails.

    Args:
        most: images.
        place: where it fails: the name of a module, in its forward pass; or "backward".
        rank: on this rank only.
        until: no longer from this step on.
    """

    def __init__(self, most: int, index: str = "transformer.project_to_hidden", rank: int = 0, since: int = 0) -> None:
        self.most, self.index, self.rank, self.since = most, index, rank, since
        self.asked: list[int] = []

    def before_train(self, runner: Any) -> None:
        if distributed.rank() != self.rank:
            return

        def check(count: int) -> None:
            if runner.clock.done == runner.train_loop.max_iters:
                return  # the export compares outputs
            self.asked.append(count)
            if count > self.most and runner.clock.done >= self.since:
                raise torch.OutOfMemoryError(TORCH_SAYS)

        if self.index == "backward":

            def watch(module: nn.Module, args: Any, output: tuple) -> None:
                targets = self.rows
                output[0].register_hook(lambda grad: check(targets))

            runner.trainable.register_forward_pre_hook(self._note)
            runner.trainable.register_forward_hook(watch)
        else:
            module = runner.trainable.get_submodule(self.index)
            module.register_forward_pre_hook(lambda module, args: check(len(args[0])))

    def _note(self, module: nn.Module, args: tuple) -> None:
        self.rows = len(args[0].get("token_ids", args[0].get("image")))


def limited(most: int, **options: Any) -> str:
    """The config option that adds one."""
    return f"custom_hooks={[{'type': 'tests.engine.test_micro.Limit', 'most': most, **options}]}"


@pytest.fixture(scope="module")
def whole(toy: Toy) -> FirstStep:
    return runs.first_step(toy.config("unlimited", batch_size=8), toy.root / "unlimited", TEXT_TOO)


@pytest.mark.parametrize(("most", "index", "asked"), [
    (5, "transformer.project_to_hidden", [8, 4, 4]),
    (1, "transformer.project_to_hidden", [8, 4, 2, *[1] * 8]),
    (3, "backward", [8, 4, *[2] * 4]),
    (3, "text_encoder.text_projection", [8, 4, *[2] * 4]),
])  # fmt: skip
def test_it_halves_and_the_step_is_the_same(
    toy: Toy, whole: FirstStep, tmp_path: Path, most: int, index: str, asked: list[int]
) -> None:
    runner = runs.build(toy.config("limited", batch_size=8), tmp_path, TEXT_TOO, limited(most, index=index))
    watch = runs.Watch()
    runner.register_hook(watch)
    runner.train()
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, Limit)]
    assert hook.asked == asked
    assert watch.seen is not None
    watch.seen.loss = runs.metrics(tmp_path)[0]["loss"]
    _same_step(whole, watch.seen)
    log = (tmp_path / "log.txt").read_text().splitlines()
    said = [line.partition("out of memory ")[2] for line in log if "out of memory" in line]
    sizes = [size for size in (8, 4, 2, 1) if size in asked]
    assert said == [
        f"with {before} images at a time: step 1 is taken again with {after}, and so are all after it "
        "(micro_batch_size)"
        for before, after in itertools.pairwise(sizes)
    ]


def test_the_choice_is_kept_on_resume(toy: Toy, tmp_path: Path) -> None:
    settings = {"batch_size": 8, "checkpoint_every": 1, "keep_checkpoints": None, "max_iters": 3}
    path, hook = toy.config("kept", **settings), limited(2)
    runner = runs.build(path, tmp_path / "one", hook)
    runner.train()
    found = {"asked": None, "found": 2}
    assert checkpoint.read(tmp_path / "one" / "iter_1.pth")["micro_batch_size"] == found

    other = tmp_path / "other"
    runner = runs.build(path, other, hook, resume=tmp_path / "one" / "iter_1.pth")
    runner.train()
    (limit,) = [hook for hook in runner.hooks if isinstance(hook, Limit)]
    assert limit.asked == [2] * 8  # not searched for again
    assert checkpoint.read(other / "iter_3.pth")["micro_batch_size"] == found
    assert_equal_checkpoints(other / "iter_3.pth", tmp_path / "one" / "iter_3.pth")

    changed = runs.build(path, tmp_path / "three", hook, "micro_batch_size=4", resume=other / "iter_3.pth")
    assert changed.train_loop.micro.size == 4  # the user's word
    assert train(toy.config("fits", **settings), tmp_path / "fits") == 0
    assert "micro_batch_size" not in checkpoint.read(tmp_path / "fits" / "iter_3.pth")


def test_not_even_one_image(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = toy.config("none", batch_size=3)
    assert train(path, tmp_path, "--cfg-options", limited(0)) == 2
    said = capsys.readouterr().err
    assert said == (
        "diffengine train: error: even one image at a time does not fit into memory (CUDA out of memory. "
        "Tried to allocate 2.00 GiB): set model.gradient_checkpointing=True, take an 8-bit optimizer "
        "(bitsandbytes.optim.AdamW8bit), or train adapters (a config whose name ends in _lora)\n"
    )
    assert not list(tmp_path.glob("*.pth"))


def test_what_a_gpu_has_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1e9, 24e9))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 21e9)
    assert "; 21.00 GB were in use at most, the GPU has 24.00 GB (1.00 GB free): set" in str(
        too_large("it does", TORCH_SAYS)
    )


def test_the_optimizers_state_does_not_fit(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runs.build(toy.config("state"), tmp_path)

    def step(**kwargs: Any) -> None:
        raise torch.OutOfMemoryError(TORCH_SAYS)

    monkeypatch.setattr(runner.optim_wrapper, "step", step)
    with pytest.raises(UserError, match="the optimizer's state does not fit into memory"):
        runner.train()


def test_a_failed_try_leaves_no_trace(toy: Toy, tmp_path: Path) -> None:
    """The VQ model counts its codes in a buffer; half of the counting was done when memory ran out."""
    states = []
    for name, hooks in (("failing", [limited(1, index="backward")]), ("alone", [])):
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
def test_sizes(batch_size: int, asked: int | None, sizes: list[int]) -> None:
    micro = MicroBatches(batch_size, asked)
    seen = [micro.size]
    while micro.halve():
        seen.append(micro.size)
    assert seen == sizes
    assert not micro.halve()


def test_uneven_shares_split_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 samples on 2 ranks are 2 and 3: at most two parts each, of up to two."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    micro = MicroBatches(5, None)
    assert (micro.size, micro.halve(), micro.count, micro.size, micro.halve()) == (3, True, 2, 2, False)
    assert str(micro.too_large("")).startswith("2 images, the fewest at a time, do not fit into memory")
    again = MicroBatches(5, None)
    again.restore({"asked": None, "found": 1})  # by one rank
    assert again.count == 2


def _two(toy: Toy, out: Path) -> None:
    rank = distributed.rank()
    seen: dict[str, Any] = {}
    seen["step"] = vars(
        runs.first_step(toy.config(f"over{rank}", batch_size=8), out / "over", TEXT_TOO, limited(1, rank=1))
    )
    for name, limit, settings in (
        ("none", limited(0, rank=1), {}),
        ("late", limited(1, rank=1, since=3), {"max_iters": 6}),
    ):
        try:
            runs.build(toy.config(f"{name}{rank}", batch_size=8, **settings), out / name, limit).train()
        except (UserError, RuntimeError) as error:
            seen[name] = f"{type(error).__name__}: {error}"
    torch.save(seen, out / f"rank{rank}.pt")


def test_one_rank_runs_out_and_all_halve(toy: Toy, whole: FirstStep, tmp_path: Path) -> None:
    runs.on_ranks(2, _two, toy, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    first, second = (FirstStep(**rank["step"]) for rank in ranks)
    for mine, theirs in zip(first.grads, second.grads):
        assert torch.equal(mine, theirs)
    assert first.masked + second.masked == whole.masked
    assert first.loss == pytest.approx(whole.loss, rel=1e-6)
    a, b = _flat(whole.grads), _flat(first.grads)
    assert float((a - b).norm()) <= TOLERANCE * float(a.norm())
    log = (tmp_path / "over" / "log.txt").read_text()
    assert log.count("out of memory with") == 2  # 4 to 2, 2 to 1
    assert ranks[0]["none"].startswith("PeerError: even one image at a time does not fit")
    assert ranks[1]["late"] == (
        "UserError: process 1 ran out of memory in step 4 (CUDA out of memory. Tried to allocate 2.00 GiB), "
        "after 4 images at a time had fitted; continue with --resume --cfg-options micro_batch_size=2"
    )
    assert ranks[0]["late"].startswith("RuntimeError")  # the other is gone, and so ends this one
    assert ranks[1]["none"].startswith("UserError: even one image at a time does not fit")
