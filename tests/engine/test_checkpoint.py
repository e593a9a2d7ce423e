"""Law 2: a checkpoint is plain, whole, and only what training changes."""

import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook

from diffengine.engine import checkpoint
from diffengine.errors import UserError
from tests.engine import runs
from tests.engine.runs import Toy, in_child, train

MEGABYTE = 2**20


def test_it_holds_what_training_changes_and_nothing_else(toy: Toy, reference: Path) -> None:
    path = reference / "iter_12.pth"
    state = torch.load(path, weights_only=True)
    assert list(state) == [
        "format", "name", "config", "folder", "model", "assets", "optimizer", "param_scheduler", "scaler",
        "counters", "num_samples",
    ]  # fmt: skip
    runner = runs.build(toy.config("look"), toy.root / "look")
    transformer = runner.trainable.module("transformer")
    assert set(state["model"]) == {f"transformer.{name}" for name, _ in transformer.named_parameters()}
    assert state["counters"] == {"iter": 12, "epoch": 4}
    assert state["assets"] == {}
    trained = sum(4 * parameter.numel() for parameter in transformer.parameters())
    assert 3 * trained < path.stat().st_size < 3 * trained * 1.1  # 170 small tensors; large ones weigh nothing


def test_nothing_is_copied_to_save(toy: Toy, tmp_path: Path) -> None:
    runner = runs.build(toy.config("live"), tmp_path)
    live = {name: parameter.data_ptr() for name, parameter in runner.trainable.named_parameters()}
    assert {name: tensor.data_ptr() for name, tensor in runner.trainable.trained_state().items()} == live


def test_resumed_state_is_not_the_mapped_file(toy: Toy, reference: Path, tmp_path: Path) -> None:
    path = toy.config("mapped", max_iters=12, lr_schedule="cosine", warmup_iters=3, learning_rate=1e-3)
    runner = runs.build(path, tmp_path, resume=reference / "iter_8.pth")
    maps = Path("/proc/self/maps").read_text()
    assert "iter_8.pth" not in maps
    assert runner.clock.done == 8


def _save_under_limit(path: Path, limit: int) -> int:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python itself does at its start
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        checkpoint.write(path, {"weights": torch.ones(MEGABYTE)})
    except UserError as error:
        print(error, file=(path.parent / "said.txt").open("w"), flush=True)
        return 2
    return 0


def test_a_full_disk_leaves_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "iter_1.pth"
    checkpoint.write(path, {"format": checkpoint.FORMAT, "old": 1})
    assert in_child(_save_under_limit, path, MEGABYTE) == 2
    assert checkpoint.read(path)["old"] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["iter_1.pth", "said.txt"]
    said = (tmp_path / "said.txt").read_text()
    assert said.startswith(f"cannot write checkpoint '{path}'")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": np.float64(1)}, "checkpoint['x']['a'] is of numpy.float64"),
        ([np.zeros(2)], "checkpoint['x'][0] is of numpy.ndarray"),
        (Path("."), "checkpoint['x'] is of pathlib"),
        (len, "checkpoint['x'] is of builtins"),
        ({Path("."): 1}, "a key of checkpoint['x'] is of pathlib"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, value: Any, text: str) -> None:
    with pytest.raises(UserError) as caught:
        checkpoint.write(tmp_path / "iter_1.pth", {"x": value})
    assert text in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_plain_values_come_back(tmp_path: Path) -> None:
    values = {
        "t": torch.ones(2),
        "n": None,
        "l": [1, 2.5, "a", True, b"b"],
        "p": (1,),
        3: {"x": float("inf")},
    }
    checkpoint.write(tmp_path / "iter_1.pth", {"format": checkpoint.FORMAT, **values})
    back = checkpoint.read(tmp_path / "iter_1.pth")
    assert torch.equal(back.pop("t"), values.pop("t"))
    assert back == {"format": checkpoint.FORMAT, **values}


def _peak_while_saving(path: Path) -> int:
    """Exit code: how many times 10 MB of memory saving 320 MB took, beyond the tensors."""
    tensors = [torch.ones(16 * MEGABYTE) for _ in range(5)]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew from here
    before = _peak()
    checkpoint.write(path, {"tensors": tensors})
    return min(255, (_peak() - before) // (10 * MEGABYTE))


def _peak() -> int:
    """The most memory resident so far, in bytes, since the peak was cleared."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def test_saving_takes_no_memory(tmp_path: Path) -> None:
    """Trap: mmengine's save holds two more copies of the file."""
    path = tmp_path / "iter_1.pth"
    assert in_child(_peak_while_saving, path) <= 3
    assert path.stat().st_size > 320 * MEGABYTE


def _saved(folder: Path, name: str, done: int) -> None:
    checkpoint.write(folder / name, {"format": checkpoint.FORMAT, "counters": {"iter": done}})


def test_newest_and_prune_go_by_steps_and_leave_other_files_alone(tmp_path: Path) -> None:
    for name, done in (("iter_9.pth", 9), ("iter_10.pth", 10), ("epoch_2.pth", 8), ("epoch_3.pth", 12)):
        _saved(tmp_path, name, done)
    (tmp_path / "vae.pth").write_bytes(b"not ours")
    assert checkpoint.newest(tmp_path) == tmp_path / "epoch_3.pth"
    (tmp_path / "epoch_1.pth").write_bytes(b"of another program")
    checkpoint.prune(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 6
    checkpoint.prune(tmp_path, 2)
    kept = ["epoch_1.pth", "epoch_3.pth", "iter_10.pth", "vae.pth"]
    assert sorted(file.name for file in tmp_path.iterdir()) == kept
    with pytest.raises(UserError, match=r"epoch_1\.pth"):
        checkpoint.newest(tmp_path)
    assert checkpoint.newest(tmp_path / "nowhere") is None


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets what the disk has left."""
    usage = type(checkpoint.shutil.disk_usage("."))
    return lambda size: monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(2 * size, size, size))


def test_disk_check_counts_what_is_there_already(tmp_path: Path, free: Callable[[int], None]) -> None:
    free(3 * MEGABYTE)
    checkpoint.check_disk(tmp_path, MEGABYTE, 3)
    with pytest.raises(UserError) as caught:
        checkpoint.check_disk(tmp_path, MEGABYTE, 4)
    assert "has 3.1 MB free; 4 checkpoints of 1.0 MB need 4.2 MB: keep fewer" in str(caught.value)
    checkpoint.write(tmp_path / "iter_1.pth", {"weights": torch.ones(MEGABYTE // 4)})
    checkpoint.check_disk(tmp_path, MEGABYTE, 4)


def test_a_run_that_would_fill_the_disk_is_refused_at_the_start(
    toy: Toy, tmp_path: Path, free: Callable[[int], None], capsys: pytest.CaptureFixture
) -> None:
    free(MEGABYTE)
    settings = {"max_iters": 4, "checkpoint_every": 1, "keep_checkpoints": 2, "prompts": ["a cat"]}
    assert train(toy.config("full", **settings), tmp_path) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "has 1.0 MB free; 3 checkpoints of 4.7 MB need 14.0 MB" in said
    assert not list(tmp_path.glob("*.pth"))
    assert not (tmp_path / "previews").exists()


class Adds(Hook):
    """Puts something into the checkpoint that cannot be read back."""

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint["extra"] = np.ones(3)


def test_a_hooks_unreadable_value_ends_the_run_in_one_line(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hook = "custom_hooks=[{'type': 'tests.engine.test_checkpoint.Adds'}]"
    assert train(toy.config("adds"), tmp_path, "--cfg-options", hook) == 2
    assert "checkpoint['extra'] is of numpy.ndarray" in capsys.readouterr().err
    assert not [*tmp_path.glob("*.pth"), *tmp_path.glob(".*.tmp")]
