"""Weighted samples: sum_i w_i sum_j ce_ij / sum_i w_i n_i, however the step is split."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook

from diffengine import distributed
from diffengine.datasets import collate
from diffengine.engine.loop import count_targets
from tests.engine import runs
from tests.engine.runs import FirstStep, Toy
from tests.engine.test_split import _same_step
from tests.support import photos

PRIOR = 0.3


@pytest.fixture(scope="module")
def folders(toy: Toy) -> tuple[Path, Path]:
    """Three images of the subject, four of its class."""
    mine, others = toy.root / "mine", toy.root / "class"
    for folder, count in ((mine, 3), (others, 4)):
        photos.write_photo_folder(folder, count, 40)
    return mine, others


def _config(toy: Toy, name: str, folders: tuple[Path, Path], weight: float = PRIOR, **settings: Any) -> str:
    dataset = {
        "type": "diffengine.datasets.SubjectDataset", "data": "${data}", "class_data": str(folders[1]),
        "instance_prompt": "sks", "class_prompt": "a cat", "num_class_images": 4,
        "prior_loss_weight": weight,
    }  # fmt: skip
    loader = {"dataset": dataset}
    return toy.config(name, train_dataloader=loader, batch_size=8, data=str(folders[0]), **settings)


@pytest.fixture(scope="module")
def whole(toy: Toy, folders: tuple[Path, Path]) -> FirstStep:
    return runs.first_step(_config(toy, "weighted", folders), toy.root / "weighted")


def test_the_loss_by_its_formula(toy: Toy, folders: tuple[Path, Path], whole: FirstStep, tmp_path: Path) -> None:
    """Each sample alone, without a weight, by the model that has taken no step."""
    runner = runs.build(_config(toy, "formula", folders), tmp_path)
    samples = [runner.train_loop.stream[position] for position in range(8)]
    top = bottom = plain = 0.0
    for sample in samples:
        alone = collate([{key: value for key, value in sample.items() if key != "weight"}])
        with torch.no_grad():
            loss, _ = runner.trainable(runner.trainable.prepare(alone))
        weight = sample["weight"]
        assert weight in {"sks": [1.0], "a cat": [PRIOR]}.get(sample["text"], [1.0, PRIOR])  # "": dropped
        top += weight * loss.item()
        bottom += weight * len(sample["masked"])
        plain += loss.item()
    assert len({sample["weight"] for sample in samples}) == 2
    assert whole.loss == pytest.approx(top / bottom, rel=1e-6)
    assert whole.targets == pytest.approx(bottom, rel=1e-15)
    assert abs(plain / sum(len(sample["masked"]) for sample in samples) / whole.loss - 1) > 1e-4


def test_weights_scale_out(toy: Toy, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """With the class as heavy as the subject, it is the loss without weights."""
    equal = runs.first_step(_config(toy, "equal", folders, weight=1.0), tmp_path)
    assert equal.targets == sum(len(row) for row in equal.masked)
    assert equal.loss == pytest.approx(equal.loss_sum / equal.targets)


def test_micro_batches_take_the_same_step(
    toy: Toy, folders: tuple[Path, Path], whole: FirstStep, tmp_path: Path
) -> None:
    _same_step(whole, runs.first_step(_config(toy, "parts", folders, micro_batch_size=1), tmp_path))


def _two(toy: Toy, folders: tuple[Path, Path], out: Path) -> None:
    rank = distributed.rank()
    step = runs.first_step(_config(toy, f"heavy{rank}", folders), out / "run")
    torch.save(vars(step), out / f"rank{rank}.pt")


def test_two_processes_take_the_same_step(
    toy: Toy, folders: tuple[Path, Path], whole: FirstStep, tmp_path: Path
) -> None:
    runs.on_ranks(2, _two, toy, folders, tmp_path)
    first, second = (FirstStep(**torch.load(tmp_path / f"rank{rank}.pt")) for rank in range(2))
    assert first.targets + second.targets == pytest.approx(whole.targets, rel=1e-15)
    _same_step(whole, FirstStep(first.grads, first.masked + second.masked, 0, 0, first.loss))


class Sums(Hook):
    """Keeps each step's sums and targets."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float, float]] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        assert outputs.targets == count_targets(data_batch)
        self.steps.append((*(outputs.sums[name].item() for name in ("loss", "accuracy")), outputs.targets))


def test_a_line_has_the_weighted_mean_of_its_steps(toy: Toy, folders: tuple[Path, Path], tmp_path: Path) -> None:
    runner = runs.build(_config(toy, "lines_w", folders, max_iters=4, log_every=4), tmp_path)
    sums = Sums()
    runner.register_hook(sums)
    runner.train()
    losses, correct, targets = zip(*sums.steps[1:])  # the first step has a line of its own
    line = runs.metrics(tmp_path)[-1]
    assert line["loss"] == pytest.approx(sum(losses) / sum(targets), rel=1e-6)
    assert line["accuracy"] == pytest.approx(sum(correct) / sum(targets), rel=1e-6)


def test_counts() -> None:
    assert count_targets({"num_targets": [3, 4]}) == 7
    assert isinstance(count_targets({"num_targets": [3, 4]}), int)
    assert count_targets({"num_targets": [10] * 3, "weight": [0.1, 0.1, 1.0]}) == 12.0
