"""A step is the same however it is split over ranks and micro-batches; and all ranks end together."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from diffengine import distributed
from diffengine.datasets import ImageDataset, micro_batches
from diffengine.engine.micro import MicroBatches
from diffengine.errors import Interrupted, PeerError, UserError
from tests.engine import runs
from tests.engine.conftest import REFERENCE
from tests.engine.runs import WITH_TEXT_ENCODER, FirstStep, Toy

TOLERANCE = 1e-5  # relative to the norm of the gradients; rounding gives about 1e-7


@pytest.fixture(scope="module")
def whole(toy: Toy) -> FirstStep:
    """The first step of a run on one rank with one micro-batch."""
    return runs.first_step(toy.config("whole", batch_size=8), toy.root / "whole", WITH_TEXT_ENCODER)


def flatten(grads: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([grad.flatten() for grad in grads])


def assert_same_step(one: FirstStep, other: FirstStep) -> None:
    assert one.masked == other.masked
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert one.details.keys() == other.details.keys() >= {"grad_norm", "grad_norm_embed", "captions_dropped"}
    for name, value in one.details.items():
        tolerance = TOLERANCE if name.startswith("grad_norm") else 1e-6
        assert value == pytest.approx(other.details[name], rel=tolerance), name
    a, b = flatten(one.grads), flatten(other.grads)
    assert float((a - b).norm()) <= TOLERANCE * float(a.norm())


@pytest.mark.parametrize("micro", [4, 3, 1])
def test_micro_batches_take_the_same_step(toy: Toy, whole: FirstStep, tmp_path: Path, micro: int) -> None:
    accumulated = runs.first_step(
        toy.config("micro", batch_size=8, micro_batch_size=micro), tmp_path, WITH_TEXT_ENCODER
    )
    assert_same_step(whole, accumulated)
    counts = [len(row) for row in whole.masked]
    assert len(set(counts)) > 1  # if they were equal, a mean of means would pass too


def _train_on_rank(toy: Toy, out: Path, reference: Path) -> None:
    """Train several runs on one of two ranks, and save the results to a file."""
    rank = distributed.rank()
    step = runs.first_step(toy.config(f"ranks{rank}", batch_size=8), out / "ranks", WITH_TEXT_ENCODER)
    uneven = runs.first_step(  # 5 and 4 samples: 2 and 2 micro-batches of at most 3
        toy.config(f"uneven{rank}", batch_size=9, micro_batch_size=3), out / "uneven"
    )
    outcomes = {name: _outcome(toy, out, name) for name in FAILURES}
    vq = runs.build(toy.vq_config(f"vq{rank}", 5, 5, batch_size=5), out / "vq")  # micro-batches of 1 and 2
    vq.train()
    path = toy.config(f"more{rank}", **REFERENCE)
    runs.build(path, out / "more", resume=reference / "iter_8.pth").train()
    share = {"num_targets": [1] * (2 + rank)}
    sizes = [len(chunk["num_targets"]) for chunk in micro_batches(share, MicroBatches(5, 2).count)]
    results = {"step": vars(step), "uneven": vars(uneven), "outcomes": outcomes, "sizes": sizes}
    results["vq"] = vq.trainable.trained_state()
    torch.save(results, out / f"rank{rank}.pt")


def _outcome(toy: Toy, out: Path, name: str) -> str:
    """The error that ends a run, or "trained"."""
    try:
        FAILURES[name](toy, out / name)
    except (UserError, Interrupted) as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def _damaged_on_rank_1(toy: Toy, work_dir: Path) -> None:
    """All images of rank 1 in the second step are damaged."""
    runner = runs.build(toy.config(f"damaged{distributed.rank()}", max_iters=3), work_dir)
    stream = runner.train_loop.stream
    read = type(stream.dataset).__getitem__
    bad = {stream.locate(position)[1] for position in (6, 7)}

    class Damaged(type(stream.dataset)):  # type: ignore[misc]
        __getitems__ = ImageDataset.__getitems__

        def __getitem__(self, index: int) -> Any:
            if index in bad:
                raise UserError("image is damaged")
            return read(self, index)

    stream.dataset.__class__ = Damaged
    runner.train()


def _full_disk(toy: Toy, work_dir: Path) -> None:
    import shutil

    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: type(usage(path))(10**9, 10**9, 0)  # type: ignore[assignment]
    try:
        runs.build(toy.config(f"full{distributed.rank()}"), work_dir).train()
    finally:
        shutil.disk_usage = usage


def _unknown_preview_option(toy: Toy, work_dir: Path) -> None:
    path = toy.config(f"preview{distributed.rank()}", prompts=["a cat"])
    runs.build(path, work_dir, "default_hooks.preview.options={'colour': 1}").train()


def _work_dir_with_a_run(toy: Toy, work_dir: Path) -> None:
    runs.build(toy.config(f"again{distributed.rank()}"), work_dir.parent / "ranks")


def _signal_on_rank_1(toy: Toy, work_dir: Path) -> None:
    path = toy.config(f"signal{distributed.rank()}", max_iters=9)
    hooks = [runs.signal_at(2, signal.SIGINT)] if distributed.rank() == 1 else []
    runs.build(path, work_dir, *hooks).train()


def _unequal_micro_batches(toy: Toy, work_dir: Path) -> None:
    runs.build(toy.config(f"unequal{distributed.rank()}", batch_size=5, micro_batch_size=1), work_dir)


FAILURES = {
    "micro_batches": _unequal_micro_batches,
    "damaged": _damaged_on_rank_1,
    "full_disk": _full_disk,
    "option": _unknown_preview_option,
    "work_dir": _work_dir_with_a_run,
    "signal": _signal_on_rank_1,
}


@pytest.fixture(scope="module")
def ranks(toy: Toy, reference: Path) -> list[dict[str, Any]]:
    """The results of `_train_on_rank` on both ranks."""
    out = toy.root / "two"
    out.mkdir()
    runs.on_ranks(2, _train_on_rank, toy, out, reference)
    return [torch.load(out / f"rank{rank}.pt") for rank in range(2)]


def test_a_run_resumes_with_more_ranks(ranks: list[dict[str, Any]], toy: Toy, reference: Path) -> None:
    """Steps 9 to 12 of the reference run, on two ranks."""
    resumed, alone = (runs.metrics(folder)[-1] for folder in (toy.root / "two" / "more", reference))
    assert resumed["iter"] == alone["iter"] == 12
    assert resumed["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert resumed["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    assert resumed["lr"] == alone["lr"]


def test_the_vq_model_stays_the_same_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    """Ranks re-seed and count its codes together: 5 images a step with 64 tokens each, since the re-seed in step 3."""
    first, second = (rank["vq"] for rank in ranks)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["usage"].sum() == 2 * 5 * 64


def test_all_ranks_have_equally_many_micro_batches(ranks: list[dict[str, Any]]) -> None:
    """Else collective calls in `forward` would not match. Shares of 2 and 3 samples are split into two each."""
    assert [rank["sizes"] for rank in ranks] == [[1, 1], [1, 2]]
    problem = (
        "batch_size 5 over 2 processes gives shares of 2 and 3, which micro_batch_size 1 cannot split alike; "
        "set it to 2, or batch_size to a multiple of 2"
    )
    assert [rank["outcomes"]["micro_batches"] for rank in ranks] == [f"UserError: {problem}", f"PeerError: {problem}"]


def _joined(ranks: list[dict[str, Any]], key: str) -> FirstStep:
    """One step from the two halves that the ranks saved; their gradients must be equal."""
    first, second = (FirstStep(**rank[key]) for rank in ranks)
    for one, other in zip(first.grads, second.grads):
        assert torch.equal(one, other)
    masked, loss_sum = first.masked + second.masked, first.loss_sum + second.loss_sum
    return FirstStep(first.grads, masked, loss_sum, first.targets + second.targets, first.loss, first.details)


def test_two_processes_take_the_same_step(ranks: list[dict[str, Any]], whole: FirstStep) -> None:
    step = _joined(ranks, "step")
    assert_same_step(whole, step)
    assert step.loss_sum / step.targets == pytest.approx(whole.loss, rel=1e-6)
    mean_of_means = sum(rank["step"]["loss_sum"] / rank["step"]["targets"] for rank in ranks) / 2
    assert abs(mean_of_means / whole.loss - 1) > 100 * 1e-6  # so a mean of means would fail above


def test_uneven_shares_and_micro_batches(ranks: list[dict[str, Any]], toy: Toy, tmp_path: Path) -> None:
    alone = runs.first_step(toy.config("alone", batch_size=9), tmp_path)
    assert [len(rank["uneven"]["masked"]) for rank in ranks] == [4, 5]
    assert_same_step(alone, _joined(ranks, "uneven"))


@pytest.mark.parametrize(
    ("name", "failing_rank", "text"),
    [
        ("damaged", 1, "image is damaged"),
        ("full_disk", 0, "0.0 MB free"),
        ("option", 0, "preview option 'colour' is unknown"),
        ("work_dir", 0, "holds a run"),
    ],
)
def test_an_error_on_one_rank_ends_all_ranks(
    ranks: list[dict[str, Any]], name: str, failing_rank: int, text: str
) -> None:
    errors = [rank["outcomes"][name].partition(":")[0] for rank in ranks]
    assert errors[1 - failing_rank] == PeerError.__name__
    assert errors[failing_rank].startswith(("UserError", "Unreadable"))
    assert all(text in rank["outcomes"][name] for rank in ranks)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(ranks: list[dict[str, Any]], toy: Toy) -> None:
    errors = [rank["outcomes"]["signal"] for rank in ranks]
    assert errors == ["Interrupted: stopped by SIGTERM", "Interrupted: stopped by SIGINT"]
    assert [path.name for path in (toy.root / "two" / "signal").glob("*.pth")] == ["iter_2.pth"]
