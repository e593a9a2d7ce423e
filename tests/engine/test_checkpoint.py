"""A checkpoint holds plain data, only what training changes, and is never half written."""

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


def test_a_checkpoint_holds_only_what_training_changes(toy: Toy, reference: Path) -> None:
    path = reference / "iter_12.pth"
    state = torch.load(path, weights_only=True)
    assert list(state) == [
        "format", "name", "config", "folder", "model", "assets", "optimizer", "param_scheduler", "scaler",
        "counters", "num_samples", "precision", "metrics",
    ]  # fmt: skip
    runner = runs.build(toy.config("look"), toy.root / "look")
    transformer = runner.trainable.module("transformer")
    assert set(state["model"]) == {f"transformer.{name}" for name, _ in transformer.named_parameters()}
    assert state["counters"] == {"iter": 12, "epoch": 4}
    assert state["assets"] == {}
    trained = sum(4 * parameter.numel() for parameter in transformer.parameters())
    # The overhead is below 10% with 170 small tensors, and smaller with large ones.
    assert 3 * trained < path.stat().st_size < 3 * trained * 1.1


def test_saving_does_not_copy_the_weights(toy: Toy, tmp_path: Path) -> None:
    runner = runs.build(toy.config("live"), tmp_path)
    live = {name: parameter.data_ptr() for name, parameter in runner.trainable.named_parameters()}
    assert {name: tensor.data_ptr() for name, tensor in runner.trainable.trained_state().items()} == live


def test_a_resumed_run_does_not_map_the_file(toy: Toy, reference: Path, tmp_path: Path) -> None:
    path = toy.config("mapped", max_iters=12, lr_schedule="cosine", warmup_iters=3, learning_rate=1e-3)
    runner = runs.build(path, tmp_path, resume=reference / "iter_8.pth")
    maps = Path("/proc/self/maps").read_text()
    assert "iter_8.pth" not in maps
    assert runner.clock.done == 8


def _save_under_limit(path: Path, limit: int) -> int:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the default in Python
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        checkpoint.write(path, {"weights": torch.ones(MEGABYTE)})
    except UserError as error:
        print(error, file=(path.parent / "error.txt").open("w"), flush=True)
        return 2
    return 0


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "iter_1.pth"
    checkpoint.write(path, {"format": checkpoint.FORMAT, "old": 1})
    assert in_child(_save_under_limit, path, MEGABYTE) == 2
    assert checkpoint.read(path)["old"] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["error.txt", "iter_1.pth"]
    error = (tmp_path / "error.txt").read_text()
    assert error.startswith(f"cannot write checkpoint '{path}'")
    assert error.count("\n") == 1


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
def test_a_value_that_cannot_be_read_back_is_not_written(tmp_path: Path, value: Any, text: str) -> None:
    with pytest.raises(UserError) as caught:
        checkpoint.write(tmp_path / "iter_1.pth", {"x": value})
    assert text in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_plain_values_read_back_equal(tmp_path: Path) -> None:
    values = {
        "t": torch.ones(2),
        "n": None,
        "l": [1, 2.5, "a", True, b"b"],
        "p": (1,),
        3: {"x": float("inf")},
    }
    checkpoint.write(tmp_path / "iter_1.pth", {"format": checkpoint.FORMAT, **values})
    state = checkpoint.read(tmp_path / "iter_1.pth")
    assert torch.equal(state.pop("t"), values.pop("t"))
    assert state == {"format": checkpoint.FORMAT, **values}


def _peak_while_saving(path: Path) -> int:
    """Save 320 MB of tensors. Returns how much more memory that took, in units of 10 MB."""
    tensors = [torch.ones(16 * MEGABYTE) for _ in range(5)]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _peak()
    checkpoint.write(path, {"tensors": tensors})
    return min(255, (_peak() - before) // (10 * MEGABYTE))


def _peak() -> int:
    """The peak of resident memory in bytes, since the last reset."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def test_saving_takes_no_extra_memory(tmp_path: Path) -> None:
    """mmengine's own save needs memory for two copies of the file."""
    path = tmp_path / "iter_1.pth"
    assert in_child(_peak_while_saving, path) <= 3
    assert path.stat().st_size > 320 * MEGABYTE


def _save(folder: Path, name: str, done: int) -> None:
    checkpoint.write(folder / name, {"format": checkpoint.FORMAT, "counters": {"iter": done}})


def test_newest_and_prune_order_by_step_and_ignore_other_files(tmp_path: Path) -> None:
    for name, done in (("iter_9.pth", 9), ("iter_10.pth", 10), ("epoch_2.pth", 8), ("epoch_3.pth", 12)):
        _save(tmp_path, name, done)
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
def set_free_space(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the free space of the disk, in bytes."""
    usage = type(checkpoint.shutil.disk_usage("."))
    return lambda size: monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(2 * size, size, size))


def test_the_disk_check_counts_existing_checkpoints(tmp_path: Path, set_free_space: Callable[[int], None]) -> None:
    set_free_space(3 * MEGABYTE)
    checkpoint.check_disk(tmp_path, MEGABYTE, 3)
    with pytest.raises(UserError) as caught:
        checkpoint.check_disk(tmp_path, MEGABYTE, 4)
    assert "has 3.1 MB free; 4 checkpoints of 1.0 MB need 4.2 MB: keep fewer" in str(caught.value)
    checkpoint.write(tmp_path / "iter_1.pth", {"weights": torch.ones(MEGABYTE // 4)})
    checkpoint.check_disk(tmp_path, MEGABYTE, 4)


def test_a_run_that_would_fill_the_disk_is_refused_at_the_start(
    toy: Toy, tmp_path: Path, set_free_space: Callable[[int], None], capsys: pytest.CaptureFixture
) -> None:
    set_free_space(MEGABYTE)
    settings = {"max_iters": 4, "checkpoint_every": 1, "keep_checkpoints": 2, "prompts": ["a cat"]}
    assert train(toy.config("full", **settings), tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "has 1.0 MB free; 3 checkpoints of 4.7 MB need 14.0 MB" in error
    assert not list(tmp_path.glob("*.pth"))
    assert not (tmp_path / "previews").exists()


class UnreadableValueHook(Hook):
    """Adds a value to the checkpoint that cannot be read back."""

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint["extra"] = np.ones(3)


def test_an_unreadable_value_of_a_hook_is_reported(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hook = "custom_hooks=[{'type': 'tests.engine.test_checkpoint.UnreadableValueHook'}]"
    assert train(toy.config("adds"), tmp_path, "--cfg-options", hook) == 2
    assert "checkpoint['extra'] is of numpy.ndarray" in capsys.readouterr().err
    assert not [*tmp_path.glob("*.pth"), *tmp_path.glob(".*.tmp")]
