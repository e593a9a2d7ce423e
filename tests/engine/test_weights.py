"""The loss of weighted samples is sum_i w_i sum_j ce_ij / sum_i w_i n_i, however a step is split."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook

from diffengine import distributed
from diffengine.datasets import collate, generator
from diffengine.datasets.stream import SAMPLE
from diffengine.engine.loop import count_targets
from tests.engine import runs
from tests.engine.runs import FirstStep, Toy
from tests.engine.test_split import assert_same_step
from tests.support import photos

PRIOR = 0.3


@pytest.fixture(scope="module")
def folders(toy: Toy) -> tuple[Path, Path]:
    """A folder with three images of the subject, and one with four of its class."""
    subject_folder, class_folder = toy.root / "subject", toy.root / "class"
    for folder, count in ((subject_folder, 3), (class_folder, 4)):
        photos.write_photo_folder(folder, count, 40)
    return subject_folder, class_folder


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
    """The first step of a run that does not split it."""
    return runs.first_step(_config(toy, "weighted", folders), toy.root / "weighted")


def test_the_loss_follows_its_formula(toy: Toy, folders: tuple[Path, Path], whole: FirstStep, tmp_path: Path) -> None:
    """The untrained model computes the loss of each sample alone, without its weight."""
    runner = runs.build(_config(toy, "formula", folders), tmp_path)
    samples = [runner.train_loop.stream[position] for position in range(8)]
    weighted_sum = total_weight = unweighted_sum = 0.0
    buckets: dict[int, list[float]] = {}
    sources: dict[str, list[float]] = {"subject": [0, 0], "class": [0, 0]}
    for position, sample in enumerate(samples):
        alone = collate([{key: value for key, value in sample.items() if key != "weight"}])
        with torch.no_grad():
            loss, _ = runner.trainable(runner.trainable.prepare(alone))
        weight = sample["weight"]
        assert weight in {"sks": [1.0], "a cat": [PRIOR]}.get(sample["text"], [1.0, PRIOR])  # "": a dropped caption
        weighted_sum += weight * loss.item()
        total_weight += weight * len(sample["masked"])
        t = generator(runner.seed, SAMPLE, position).random(3)[2]  # after the draws of caption and dropout
        source = sources["subject" if weight == 1 else "class"]
        for sums in (buckets.setdefault(int(8 * t), [0, 0]), source):
            sums[0] += weight * loss.item()
            sums[1] += weight * len(sample["masked"])
        unweighted_sum += loss.item()
    assert len({sample["weight"] for sample in samples}) == 2
    assert whole.loss == pytest.approx(weighted_sum / total_weight, rel=1e-6)
    assert whole.targets == pytest.approx(total_weight, rel=1e-15)
    logged = {name: value for name, value in whole.details.items() if name.startswith("loss")}
    expected = {f"loss_t{bucket}": loss_sum / weight for bucket, (loss_sum, weight) in buckets.items()}
    expected |= {f"loss/{name}": loss_sum / weight for name, (loss_sum, weight) in sources.items()}
    assert logged == pytest.approx(expected, rel=1e-6)
    unweighted = unweighted_sum / sum(len(sample["masked"]) for sample in samples)
    assert abs(unweighted / whole.loss - 1) > 1e-4


def test_equal_weights_give_the_unweighted_loss(toy: Toy, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A class image weighs as much as an image of the subject here."""
    equal = runs.first_step(_config(toy, "equal", folders, weight=1.0), tmp_path)
    assert equal.targets == sum(len(row) for row in equal.masked)
    assert equal.loss == pytest.approx(equal.loss_sum / equal.targets)


def test_micro_batches_take_the_same_step(
    toy: Toy, folders: tuple[Path, Path], whole: FirstStep, tmp_path: Path
) -> None:
    assert_same_step(whole, runs.first_step(_config(toy, "micro_batches", folders, micro_batch_size=1), tmp_path))


def _train_on_rank(toy: Toy, folders: tuple[Path, Path], out: Path) -> None:
    rank = distributed.rank()
    step = runs.first_step(_config(toy, f"weighted{rank}", folders), out / "run")
    torch.save(vars(step), out / f"rank{rank}.pt")


def test_two_processes_take_the_same_step(
    toy: Toy, folders: tuple[Path, Path], whole: FirstStep, tmp_path: Path
) -> None:
    runs.on_ranks(2, _train_on_rank, toy, folders, tmp_path)
    first, second = (FirstStep(**torch.load(tmp_path / f"rank{rank}.pt")) for rank in range(2))
    assert first.targets + second.targets == pytest.approx(whole.targets, rel=1e-15)
    assert_same_step(whole, FirstStep(first.grads, first.masked + second.masked, 0, 0, first.loss, first.details))


class SumsHook(Hook):
    """Records the sums and the weighted number of targets of each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float, float]] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        assert outputs.targets == count_targets(data_batch)
        self.steps.append((*(outputs.sums[name].item() for name in ("loss", "accuracy")), outputs.targets))


def test_a_log_line_has_the_weighted_mean_of_its_steps(toy: Toy, folders: tuple[Path, Path], tmp_path: Path) -> None:
    runner = runs.build(_config(toy, "lines_w", folders, max_iters=4, log_every=4), tmp_path)
    sums = SumsHook()
    runner.register_hook(sums)
    runner.train()
    losses, correct, targets = zip(*sums.steps[1:])  # the first step has another line
    line = runs.metrics(tmp_path)[-1]
    assert line["loss"] == pytest.approx(sum(losses) / sum(targets), rel=1e-6)
    assert line["accuracy"] == pytest.approx(sum(correct) / sum(targets), rel=1e-6)


def test_the_number_of_targets() -> None:
    assert count_targets({"num_targets": [3, 4]}) == 7
    assert isinstance(count_targets({"num_targets": [3, 4]}), int)
    assert count_targets({"num_targets": [10] * 3, "weight": [0.1, 0.1, 1.0]}) == 12.0
