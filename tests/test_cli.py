"""The command line: help, exit codes, list-cfg, and multiple processes."""

import errno
import importlib
import io
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from diffengine import __version__, cli, config
from diffengine.commands import convert, launch
from diffengine.errors import PeerError, UserError
from tests.support.models import make_model_folder
from tests.support.photos import write_photo_folder
from tests.support.processes import is_running, wait_for


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
        (["train", "a", "--work-dir", "x" * 90_000], "diffengine train: error: unknown config 'a'"),
        (["sample", "x", "a", "--n", "²"], "diffengine sample: error: argument --n: invalid int value: '²'"),
        (["sample", "x", "a", "--n", "9" * 5000], "diffengine sample: error: argument --n: invalid int value: '999"),
        (["copy-cfg", "vq_32_emoji", "a" * 300 + ".py"], "diffengine copy-cfg: error: cannot read or write 'aaa"),
        (["copy-cfg", "vq_32_emoji", "\n"], "diffengine copy-cfg: error: copy-cfg got ' '; expected a file name"),
        (["report", "a" * 300], "diffengine report: error: "),
        (["convert", "a" * 300], "diffengine convert: error: "),
        (["convert", "vq_32_emoji", "a" * 300, "out"], "diffengine convert: error: "),
        (["sample", "a" * 300, "a cat"], "diffengine sample: error: "),
        (["sample", "~nobody-here/x", "a cat"], "diffengine sample: error: '~nobody-here/x' names the home"),
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


def test_closed_and_narrow_streams_take_any_line(monkeypatch, tmp_path):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setattr(sys, "stderr", None)
    cli.open_streams()
    assert cli.main(["copy-cfg", "vq_32_emoji", str(tmp_path / "\u4e2d.py")]) == 0
    assert rb"\u4e2d.py" in written.getvalue()
    assert cli.main(["copy-cfg", "none", "x.py"]) == 2
    assert not sys.stderr.isatty()
    sys.stderr.close()


def test_options_are_not_abbreviated(capsys):
    """`tools/slurm_train.sh` would not know them."""
    assert cli.main(["train", "amused_512_own", "--over"]) == 2
    assert "unrecognized arguments: --over;" in capsys.readouterr().err


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


def environment(rank, local_rank, world, local_world, address, port):
    """What torch reads, in the order of its documentation."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return dict(zip(names, map(str, (rank, local_rank, world, local_world, address, port))))


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"NPROC_PER_NODE": "2"}, [environment(rank, rank, 2, 2, "127.0.0.1", 40001) for rank in (0, 1)]),
        (
            {"NPROC_PER_NODE": "2", "PORT": "29501"},
            [environment(rank, rank, 2, 2, "127.0.0.1", 29501) for rank in (0, 1)],
        ),
        (
            {"NNODES": "2", "NODE_RANK": "1", "ADDR": "a", "NPROC_PER_NODE": "2"},
            [environment(2 + rank, rank, 4, 2, "a", 29500) for rank in (0, 1)],
        ),
        (
            {"NNODES": "2", "ADDR": "a", "MASTER_ADDR": "b", "PORT": "1", "MASTER_PORT": "2"},
            [environment(0, 0, 2, 1, "b", 2)],
        ),
    ],
)  # fmt: skip
def test_environment_of_the_processes(monkeypatch, env, expected):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = launch.rank_environments(free_port=40001)
    assert [rank.pop("OMP_NUM_THREADS", None) for rank in found] == ["1" if len(found) > 1 else None] * len(found)
    assert found == expected
    assert launch.processes_asked()


def test_one_process_by_default():
    assert not launch.processes_asked()


@pytest.fixture
def toy(folder, monkeypatch):
    """A config that trains two steps a second. Returns the work dir."""
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
    return folder / "work_dirs" / "toy"


def logged_steps(work_dir):
    path = work_dir / "metrics.jsonl"
    return [json.loads(line)["iter"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.soak
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
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


RANK = """
import os, signal, sys, time
from diffengine.commands.launch import LAUNCHED, report
rank, channel = int(os.environ["RANK"]), int(os.environ[LAUNCHED].split()[1])
def say(code, text):
    report(channel, code, text)
    sys.exit(code)
"""
SURVIVE = "say(1, 'Traceback of a connection that was closed')"  # what a rank says when another has died


@pytest.mark.parametrize(
    ("ranks", "grace", "code", "line"),
    [
        (["os.kill(os.getpid(), 9)", SURVIVE], 30, 137, "rank 0 was killed by SIGKILL, perhaps for lack of memory"),
        ([SURVIVE, "time.sleep(0.2); os._exit(3)"], 30, 3, "rank 1 ended with exit code 3"),
        (["time.sleep(60)", "signal.raise_signal(11)"], 0.3, 139, "rank 1 was killed by SIGSEGV"),
    ],
    ids=["killed", "exit", "segfault"],
)
def test_a_rank_that_dies_ends_all_with_one_line(folder, monkeypatch, capfd, ranks, grace, code, line):
    """The ranks are processes that do what is given; the last one does not notice the death."""
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.setattr(launch, "GRACE", grace)
    monkeypatch.setattr(launch, "COMMAND", [sys.executable, "-c", f"{RANK}exec({ranks}[rank])"])
    assert launch.launch("train", [], folder) == code
    advice = f"; the log is '{folder / 'log.txt'}'; continue with --resume"
    assert capfd.readouterr().err == f"diffengine train: failed: {line}{advice}\n"


def test_a_rank_of_several_nodes_is_named_with_its_host(folder, monkeypatch, capfd):
    for name, value in {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "COMMAND", [sys.executable, "-c", "import os; os._exit(3)"])
    assert launch.launch("check", [], folder) == 3
    line = f"diffengine check: failed: rank 1 on {socket.gethostname()} ended with exit code 3\n"
    assert capfd.readouterr().err == line


def test_the_first_rank_that_fails_is_the_cause_and_the_others_end_in_order(folder, monkeypatch, capfd):
    """A bug of one rank; the other has a signal on its mind, and leaves through `finally`."""
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    late = "time.sleep(0.3); import atexit; atexit.register(open('left', 'w').close); say(143, 'stopped')"
    program = f"{RANK}say(1, 'the cause') if rank else exec({late!r})"
    monkeypatch.setattr(launch, "COMMAND", [sys.executable, "-c", program])
    assert launch.launch("train", [], folder) == 1
    assert capfd.readouterr().err == "the cause\n"
    assert (folder / "left").exists()


def test_the_ranks_are_killed_with_the_launcher(folder, monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    write = "open(f'{rank}.pid', 'w').write(str(os.getpid())); os.rename(f'{rank}.pid', f'{rank}'); time.sleep(60)"
    lead = f"{RANK}from diffengine import distributed; distributed.end_with_parent(os.getppid()); {write}"
    monkeypatch.setattr(launch, "COMMAND", [sys.executable, "-c", lead])
    launcher = multiprocessing.get_context("fork").Process(target=launch.launch, args=("train", [], folder))
    launcher.start()
    wait_for(lambda: all((folder / name).exists() for name in "01"))
    ranks = [int((folder / name).read_text()) for name in "01"]
    launcher.kill()
    launcher.join()
    wait_for(lambda: not any(map(is_running, ranks)))


@pytest.mark.soak
def test_a_rank_that_is_killed_while_it_trains(toy, monkeypatch, capfd, tmp_path_factory):
    """It is stopped and continued first. The other one, the workers and their folders end with it."""
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(temporary))
    steps, processes = [], []

    def kill():
        wait_for(lambda: len(logged_steps(toy)) > 1, 240)
        ranks = children(os.getpid())
        processes.extend([*ranks, *(worker for rank in ranks for worker in children(rank))])
        os.kill(ranks[1], signal.SIGSTOP)
        time.sleep(3)
        steps.append(len(logged_steps(toy)))
        os.kill(ranks[1], signal.SIGCONT)
        wait_for(lambda: len(logged_steps(toy)) > steps[0] + 2, 240)
        steps.append(time.monotonic())
        os.kill(ranks[1], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    assert cli.main(["train", "toy.py", "--cfg-options", "max_iters=100000", "num_workers=1"]) == 137
    assert time.monotonic() - steps[1] < 10
    line = "rank 1 was killed by SIGKILL, perhaps for lack of memory; the log is 'work_dirs/toy/log.txt'"
    assert capfd.readouterr().err == f"diffengine train: failed: {line}; continue with --resume\n"
    assert len(processes) == 4
    wait_for(lambda: not any(map(is_running, processes)), 10)
    assert [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor")] == []


def children(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for task in tasks for child in task.read_text().split())


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
