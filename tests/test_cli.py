"""The command line: help, exit codes, list-cfg, and multiple processes."""

import errno
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from diffengine import __version__, cli, config
from diffengine.commands import convert, launch
from diffengine.errors import PeerError, UserError
from tests.support.models import make_model_folder
from tests.support.photos import write_photo_folder

TORCHRUN_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "NPROC_PER_NODE",
        "NNODES",
        "NODE_RANK",
        "ADDR",
        "MASTER_ADDR",
        "PORT",
        "MASTER_PORT",
        "RANK",
    ):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def fail_with(monkeypatch, error):
    """Makes list-cfg raise this error."""

    def shipped():
        raise error

    monkeypatch.setattr(config, "shipped", shipped)


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"diffengine {__version__}\n"
    assert cli.main(["--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for name in cli.COMMANDS:
        module = importlib.import_module(f"diffengine.commands.{name.replace('-', '_')}")
        summary = module.__doc__.partition("\n\n")[0]
        assert f"{name} {' '.join(summary.split())}" in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_each_command(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: diffengine {command} ")


def test_user_error_prints_one_line_and_exits_with_2(monkeypatch, capsys):
    fail_with(monkeypatch, UserError("got this;\n   expected that"))
    assert cli.main(["list-cfg"]) == 2
    assert capsys.readouterr().err == "diffengine list-cfg: error: got this; expected that\n"


def test_error_of_another_process_is_not_repeated(monkeypatch, capsys):
    fail_with(monkeypatch, PeerError("got this"))
    assert cli.main(["list-cfg"]) == 2
    assert capsys.readouterr().err == ""


def test_internal_error_prints_a_traceback_and_exits_with_1(monkeypatch, capsys):
    fail_with(monkeypatch, ZeroDivisionError("by zero"))
    assert cli.main(["list-cfg"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "diffengine list-cfg: failed: ZeroDivisionError: by zero"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG])
def test_disk_error_prints_one_line_and_exits_with_2(monkeypatch, capsys, number):
    reason = os.strerror(number)
    fail_with(monkeypatch, OSError(number, reason, "run/config.py"))
    assert cli.main(["list-cfg"]) == 2
    assert capsys.readouterr().err == (
        f"diffengine list-cfg: error: cannot read or write 'run/config.py': {reason}; free space or fix the "
        "permissions, or choose another folder\n"
    )


def test_other_os_errors_are_internal_errors(monkeypatch, capsys):
    fail_with(monkeypatch, OSError(errno.EIO, "Input/output error"))
    assert cli.main(["list-cfg"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "out of memory (Python); choose smaller sizes, or a smaller batch"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "out of memory (Def",
        ),
        (RuntimeError("Could not determine home directory."), "cannot follow a path that begins with ~"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 9000), "cannot read or write 'aaa"),
    ],
)
def test_what_the_system_refuses_prints_one_line_and_exits_with_2(monkeypatch, capsys, error, text):
    fail_with(monkeypatch, error)
    assert cli.main(["list-cfg"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"diffengine list-cfg: error: {text}")
    assert len(line) < 2100


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["list-cfg", "a\0b"], r"diffengine: error: got the argument 'a\x00b'; expected UTF-8 text without NUL"),
        (["train", "a.py", "--data", "\udcff"], r"diffengine: error: got the argument '\udcff'; expected UTF-8 text"),
        (["sample", "x", "a" * 200_000], "diffengine: error: got the argument 'aaa"),
        (["list-cfg", "\x1b[31m"], r"diffengine list-cfg: error: no shipped config matches '\x1b[31m'; there are"),
        (["train", "--\x1b[31m\nx"], r"diffengine train: error: the following arguments are required: config; `"),
        (["train", "a", "--\x1b[31m\nx"], r"diffengine: error: unrecognized arguments: --\x1b[31m x; `diffengine"),
        (["\x1b[31m"], r"diffengine: error: argument COMMAND: invalid choice: '\x1b[31m'"),
        (["train", "a", "--launcher", "x"], "diffengine train: error: argument --launcher: invalid choice: 'x'"),
        (["train", "a", "--work-d", "x" * 90_000], "diffengine train: error: unknown config 'a'"),
        (["sample", "x", "a", "--n", "²"], "diffengine sample: error: argument --n: invalid int value: '²'"),
        (["sample", "x", "a", "--n", "9" * 5000], "diffengine sample: error: argument --n: invalid int value: '999"),
        (["copy-cfg", "vq_32_emoji", "a" * 300 + ".py"], "diffengine copy-cfg: error: cannot read or write 'aaa"),
        (["copy-cfg", "vq_32_emoji", "\n"], "diffengine copy-cfg: error: copy-cfg got ' '; expected a file name"),
        (["report", "a" * 300], "diffengine report: error: "),
        (["convert", "a" * 300], "diffengine convert: error: "),
        (["convert", "vq_32_emoji", "a" * 300, "out"], "diffengine convert: error: "),
        (["sample", "a" * 300, "a cat"], "diffengine sample: error: "),
        (["sample", "~nobody-here/x", "a cat"], "diffengine sample: error: cannot follow a path that begins with ~"),
        (["eval", "a" * 300], "diffengine eval: error: "),
    ],
)
def test_odd_arguments_print_one_line_and_exit_with_2(argv, text, capsys):
    assert cli.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(text)
    assert line.isprintable()
    assert len(line) < 2500


def test_the_command_keeps_warnings_of_libraries_out_of_its_lines(monkeypatch, capfd):
    """Unless `python -W` asks for them."""

    def warns():
        warnings.warn("a warning", stacklevel=1)
        logging.getLogger("PIL.a_format").warning("a warning")
        raise UserError("got this")

    monkeypatch.setattr(config, "shipped", warns)
    monkeypatch.setattr(sys, "argv", ["diffengine", "list-cfg"])
    for options, shown in (([], 0), (["default"], 1)):
        monkeypatch.setattr(sys, "warnoptions", options)
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        with warnings.catch_warnings(record=True, action="default") as caught, pytest.raises(SystemExit, match="2"):
            cli.console()
        *logged, line = capfd.readouterr().err.splitlines()
        assert line == "diffengine list-cfg: error: got this"
        assert (logged, len(caught)) == (["a warning"] * shown, shown)
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"


def test_interrupt_and_broken_pipe(monkeypatch, capsys):
    fail_with(monkeypatch, KeyboardInterrupt())
    assert cli.main(["list-cfg"]) == 130
    assert capsys.readouterr().err == "diffengine list-cfg: stopped at once\n"
    fail_with(monkeypatch, BrokenPipeError())
    assert cli.main(["list-cfg"]) == 141
    assert capsys.readouterr().err == ""


def test_list_cfg(capsys):
    assert cli.main(["list-cfg"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(config.shipped())
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)
    assert cli.main(["list-cfg", "amused_512_own"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "amused_512_own       aMUSEd 512 on your own captioned images, 1,000 steps."
    assert [line.split()[0] for line in lines] == ["amused_512_own", "amused_512_own_lora"]
    assert cli.main(["list-cfg", "vq_*"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["vq_32_emoji"]


@pytest.mark.parametrize(
    "line",
    [
        "c x.pth out --save-keys a",
        "c x.pth out --save-keys a b",
        "c x.pth --save-keys a out",
        "c x.pth --save-keys a b out",
        "c --save-keys a b x.pth out",
        "--save-keys a b c x.pth out",
        "--save-keys a c x.pth out --ema",
        "--save-keys a --save-keys b -- c x.pth out",
        "run --save-keys a b",
        "--save-keys a run",
        "run",
    ],
)
def test_save_keys_may_come_anywhere(line):
    positional, keys = convert._words(cli.parser().parse_args(["convert", *line.split()]))
    given = [word for word in line.split() if not word.startswith("-")]
    assert positional == [word for word in given if word not in "ab"]
    assert (keys or []) == [word for word in given if word in "ab"]


# ---------------------------------------------------------------------------------------------- processes


def rendezvous(address, port, node):
    return [f"--master-addr={address}", f"--master-port={port}", f"--node-rank={node}"]


@pytest.mark.parametrize(
    ("env", "arguments"),
    [
        ({"NPROC_PER_NODE": "8"}, ["--nnodes=1", "--nproc-per-node=8", "--standalone"]),
        (
            {"NPROC_PER_NODE": "2", "PORT": "29501"},
            ["--nnodes=1", "--nproc-per-node=2", *rendezvous("127.0.0.1", 29501, 0)],
        ),
        (
            {"NNODES": "2", "NODE_RANK": "1", "ADDR": "a", "NPROC_PER_NODE": "4"},
            ["--nnodes=2", "--nproc-per-node=4", *rendezvous("a", 29500, 1)],
        ),
        (
            {"NNODES": "2", "ADDR": "a", "MASTER_ADDR": "b", "PORT": "1", "MASTER_PORT": "2"},
            ["--nnodes=2", "--nproc-per-node=1", *rendezvous("b", 2, 0)],
        ),
    ],
)  # fmt: skip
def test_torchrun_arguments(monkeypatch, env, arguments):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert launch.torchrun_arguments() == arguments
    assert launch.processes_asked()


def test_one_process_by_default():
    assert not launch.processes_asked()


@pytest.fixture
def toy(folder, monkeypatch):
    """A config that trains two steps a second; restores the signal handlers. Returns the work dir."""
    write_photo_folder(folder / "photos", 4, 48)
    make_model_folder(folder / "model", "toy")
    text = (
        "extends = 'amused_512_own'\nresolution = 32\ndata = 'photos'\npretrained = 'model'\n"
        "batch_size = 2\nnum_workers = 0\nprompts = ['a cat']\nlog_every = 1\npreview_every = None\n"
        "validation_every = 0\n"
        "checkpoint_every = None\ndefault_hooks = dict(export=None)\n"
    )
    (folder / "toy.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    handlers = {signum: signal.getsignal(signum) for signum in TORCHRUN_SIGNALS}
    yield folder / "work_dirs" / "toy"
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def logged_steps(work_dir):
    path = work_dir / "metrics.jsonl"
    return [json.loads(line)["iter"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.soak)]
)
def test_two_processes_finish_the_step_and_save_on_a_signal(toy, monkeypatch, capfd, signum, code):
    monkeypatch.setenv("NPROC_PER_NODE", "2")

    def stop_after_two_steps():
        deadline = time.monotonic() + 240
        while len(logged_steps(toy)) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(os.getpid(), signum)

    threading.Thread(target=stop_after_two_steps, daemon=True).start()
    assert cli.main(["train", "toy.py", "--cfg-options", "max_iters=100000"]) == code
    out, err = capfd.readouterr()
    assert err.splitlines()[-1] == f"diffengine train: stopped by {signum.name}; continue with --resume"
    assert "Traceback" not in err
    assert "2 x cpu" in out
    assert [path.name for path in toy.glob("*.pth")] == [f"iter_{logged_steps(toy)[-1]}.pth"]


def test_launcher_prints_the_error_of_a_process(toy, monkeypatch, capsys):
    monkeypatch.setenv(launch.LAUNCHED, "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "error.json")
    assert cli.main(["train", "toy.py", "--data", "nowhere/at/all"]) == 2
    assert capsys.readouterr().err == ""
    failure = ProcessFailure(local_rank=1, pid=7, exitcode=2, error_file="error.json")
    assert launch.report("train", ChildFailedError("train", {1: failure})) == 2
    err = capsys.readouterr().err
    assert err.startswith("diffengine train: error: no file or folder 'nowhere/at/all'")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("exitcode", "code", "reason"),
    [(1, 1, "exit code 1, see above"), (-9, 137, "Signal 9 (SIGKILL) received by PID 7")],
)
def test_exit_code_of_a_failed_process(exitcode, code, reason, capsys):
    failure = ProcessFailure(local_rank=1, pid=7, exitcode=exitcode, error_file="none")
    assert launch.report("train", ChildFailedError("train", {1: failure})) == code
    assert capsys.readouterr().err == f"diffengine train: failed: process 1: {reason}\n"


@pytest.mark.soak
def test_error_in_two_processes_prints_one_line_and_exits_with_2(toy, monkeypatch, capfd):
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    capfd.readouterr()
    assert cli.main(["train", "toy.py", "--data", "nowhere/at/all"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("diffengine train: error: no file or folder 'nowhere/at/all'")
    assert err.count("\n") == 1
    assert launch.LAUNCHED not in os.environ
    assert not toy.exists() or list(toy.iterdir()) == []
