"""Start-up under launchers, and errors across ranks."""

import errno
import os
import socket
from typing import Any

import pytest

from diffengine import distributed
from diffengine.errors import PeerError, UserError
from tests.engine.runs import on_ranks

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PORT")


@pytest.fixture
def clean_env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without launcher variables. Changes are undone after the test."""
    for name in (*LAUNCHER, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[01-04]", "node01"),
        ("gpu-a[7,9-12],cpu3", "gpu-a7"),
        ("gpu-1,gpu-2", "gpu-1"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert distributed.first_host(nodes) == first


def test_slurm_variables_are_translated_for_torch(clean_env: pytest.MonkeyPatch) -> None:
    for name, value in (("PROCID", "0"), ("NTASKS", "1"), ("LOCALID", "0"), ("STEP_NODELIST", "127.0.0.1")):
        clean_env.setenv(f"SLURM_{name}", value)
    clean_env.setenv("PORT", "0")  # any free port
    try:
        distributed.start("slurm")
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
        assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    finally:
        distributed.stop()
    assert distributed.world_size() == 1


@pytest.mark.parametrize(("launcher", "text"), [("slurm", "SLURM_PROCID"), ("pytorch", "no RANK")])
def test_missing_launcher(clean_env: pytest.MonkeyPatch, launcher: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        distributed.start(launcher)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("LOCAL_RANK", "x", r"^LOCAL_RANK got 'x' in the environment; expected a whole number from 0 to 1,048,576$"),
        ("RANK", "1", r"^RANK got '1' in the environment; expected a whole number from 0 to 0$"),
        ("WORLD_SIZE", "", r"^WORLD_SIZE got '' in the environment; expected a whole number from 1 to 1,048,576$"),
        ("MASTER_PORT", "99999", r"^MASTER_PORT got '99999' in the environment; expected a whole number from 0 to"),
    ],
)
def test_a_launcher_s_mistake(clean_env: pytest.MonkeyPatch, name: str, value: str, text: str) -> None:
    started = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for key, item in {**started, name: value}.items():
        clean_env.setenv(key, item)
    with pytest.raises(UserError, match=text):
        distributed.start()


def test_a_port_in_use(clean_env: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for key, item in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            clean_env.setenv(key, item)
        with pytest.raises(UserError, match=f"^the processes cannot meet at 127.0.0.1, port {port}: .*; check MASTER_"):
            distributed.start()


def _full_disk() -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    first = distributed.rank() == 0

    def on_all_ranks(work: Any) -> None:
        with distributed.all_ranks():
            work()

    for run, work in ((distributed.on_rank_0, fail), (on_all_ranks, fail if first else int)):
        with pytest.raises(UserError if first else PeerError, match=r"write 'metrics\.jsonl': No space left") as caught:
            run(work)
        assert isinstance(caught.value, PeerError) != first


def test_full_disk_on_one_rank_stops_all_ranks() -> None:
    on_ranks(2, _full_disk)
