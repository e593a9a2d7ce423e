"""The workers of the loader: what ends them, and what a dead one means."""

import multiprocessing
import os
import re
import resource
import signal
import tempfile
import time
from pathlib import Path

import pytest
from PIL import Image

from diffengine.datasets import ImageDataset, PositionSampler, Stream, ToTensor, batches_of, make_loader
from diffengine.errors import UserError
from tests.support.processes import is_running, wait_for


class Photos(ImageDataset):
    """Images of one colour; `before` is called with the index of each that is read."""

    def __init__(self, before=lambda index: None):
        self.before = before

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.before(index)
        return {"image": Image.new("RGB", (16, 16)), "text": "a photo"}


def batches(before=lambda index: None, num_workers=1):
    """Four batches of two images."""
    stream = Stream(Photos(before), [ToTensor()], [], seed=0)
    return batches_of(make_loader(stream, PositionSampler(2, num_steps=4), num_workers))


def test_workers_give_what_the_main_process_reads():
    assert [batch["image"].shape for batch in batches()] == [(2, 3, 16, 16)] * 4
    assert [batch["image"].sum() for batch in batches()] == [batch["image"].sum() for batch in batches(num_workers=0)]


def test_too_little_shared_memory_is_one_line():
    """A limit of the size of files is one of shared memory, too. Nothing stays in /dev/shm."""

    def limit(index):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

    with pytest.raises(UserError, match=r"a worker got no shared memory for a batch: .*; give /dev/shm more") as caught:
        next(batches(limit))
    assert "\n" not in str(caught.value)
    file = re.search(r"torch_\w+", str(caught.value))
    assert not Path("/dev/shm", file[0]).exists()


@pytest.mark.soak  # torch waits for 5 seconds
@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL, perhaps for lack of memory"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), "was killed by SIGBUS, perhaps for lack of shared memory"),
        (lambda: os._exit(3), "ended with exit code 3"),
    ],
    ids=["killed", "bus error", "exit"],
)
def test_a_dead_worker_is_one_line(end, how):
    """It dies with its second batch; the first has arrived."""
    reads = []

    def before(index):
        reads.append(index)
        if len(reads) > 2:
            time.sleep(0.2)
            end()

    read = batches(before)
    assert next(read)["text"] == ["a photo"] * 2
    with pytest.raises(
        UserError, match=f"^a worker of the data loader {how}; lower num_workers; with --cfg-options num_workers=0 "
    ):
        list(read)


@pytest.mark.soak  # forks twice: next to other tests' threads it may hang
def test_workers_end_with_a_killed_main_process_and_leave_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()

    def main():
        read = batches(num_workers=2)
        next(read)
        pids = [str(worker.pid) for worker in multiprocessing.active_children()]
        (tmp_path / "pids.tmp").write_text(" ".join(pids))
        (tmp_path / "pids.tmp").rename(tmp_path / "pids")
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    wait_for((tmp_path / "pids").exists)
    workers = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(workers) == 2
    assert list((tmp_path / "temp").iterdir())
    process.kill()
    process.join()
    wait_for(lambda: not any(map(is_running, workers)), 3)  # torch's would notice after 5 seconds
    assert list((tmp_path / "temp").iterdir()) == []
