"""Running a command over a config: in this process, or in as many as the environment asks for."""

import argparse
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from select import select
from typing import TYPE_CHECKING, Any

from diffengine.errors import Interrupted, UserError, disk_errors, require
from diffengine.terminal import say
from diffengine.text import how_it_ended, one_line, printable

if TYPE_CHECKING:
    from diffengine.datasets import ImageDataset
    from diffengine.engine.build import Job

REQUEUE = 75  # exit code of a Slurm job that saved and is to be started again: EX_TEMPFAIL of sysexits.h
LAUNCHED = "DIFFENGINE_LAUNCHED"  # in the processes that `launch` starts: its process id and a socket to it
COMMAND = (sys.executable, "-m", "diffengine")  # of each rank
GRACE = 5.0  # seconds that the other ranks have to end once one has failed
RESUME = "; continue with --resume"
STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def arguments(parser: argparse.ArgumentParser) -> None:
    """What names a config, changes it, and says how processes are started."""
    add = parser.add_argument
    config = add("config", help="a shipped name (see list-cfg) or the path of a config file")

    class Data(argparse.Action):
        """Takes paths; in `--data A CONFIG` the config, too, which `run_job` takes out again."""

        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
            namespace.data = values
            config.required = len(values) == 1

    described = "images: a folder, a parquet file or a hub name, or several (sets `data`)"
    add("--data", nargs="+", action=Data, metavar="DATA", help=described)
    add("--pretrained", help="a model folder or hub name (sets `pretrained`)")
    add("--work-dir", help="the run's folder; default work_dirs/<config name>")
    example = "set anything in the config: batch_size=4 optim_wrapper.clip_grad=None"
    add("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=example)
    add("--launcher", choices=("none", "pytorch", "slurm"), default="none")


def run_job(options: argparse.Namespace, work: Callable[["Job"], object]) -> int:
    """Do `work` over the config that the options name, in every process; return the exit code."""
    from diffengine.registry import import_from_here

    if options.config is None:
        options.config = options.data.pop()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a worker's fork
    with stopped_by_signals():
        import_from_here()
        data = None if LAUNCHED in os.environ else _look(options)
        looked = data is not None or LAUNCHED in os.environ

        from diffengine import distributed

        try:
            return (_run_rank if LAUNCHED in os.environ else _run_job)(
                options, lambda job: work(replace(job, looked=looked, dataset=data))
            )
        except Interrupted as error:
            if distributed.rank() == 0:
                say(describe(options.command, error)[1], file=sys.stderr)
            return last_exit_code(error.signum)
        finally:
            distributed.stop()


def _run_job(options: argparse.Namespace, work: Callable[["Job"], object]) -> int:
    """Run the job in this process, or in the processes that `launch` starts; raises UserError and Interrupted."""
    from diffengine import distributed
    from diffengine.engine.build import load_config, make_job
    from diffengine.models.loading import quiet_libraries

    loaded = load_config(options.config, options.cfg_options, _settings(options))
    if processes_asked() and "RANK" not in os.environ and options.launcher == "none":
        return launch(options.command, options.argv, make_job(options.config, *loaded, distributed.CPU).work_dir)
    quiet_libraries()
    work(make_job(options.config, *loaded, distributed.start(options.launcher)))
    return 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    data = options.data[0] if options.data is not None and len(options.data) == 1 else options.data
    return {"data": data, "pretrained": options.pretrained, "work_dir": options.work_dir}


def _look(options: argparse.Namespace) -> "ImageDataset | None":
    """Look at the images of a local folder or file, if that is what the config has; return them.

    It imports no torch, which takes seconds.
    """
    from diffengine import config
    from diffengine.datasets.inspect import is_local, look_at_section

    if "RANK" in os.environ or options.launcher != "none":
        return None  # an error on one rank must end all of them
    try:
        loader = config.unchecked(options.config, options.cfg_options, _settings(options)).get("train_dataloader")
    except UserError:  # reported with all other errors of the config
        return None
    return look_at_section(loader) if loader is not None and is_local(loader) else None


def _run_rank(options: argparse.Namespace, work: Callable[["Job"], object]) -> int:
    """Run the job as a rank of `launch`, which prints what is reported to it."""
    from diffengine import distributed

    launcher, channel = map(int, os.environ[LAUNCHED].split())
    distributed.end_with_parent(launcher)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        with disk_errors():
            return _run_job(options, work)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the launcher decides if it is the cause
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        code, text = describe(options.command, error)
    report(channel, code, text)
    return code


def report(channel: int, code: int, text: str) -> None:
    """Tell the launcher, and wait until all ranks have ended or reported: one that leaves makes the others fail."""
    with socket.socket(fileno=channel) as launcher:
        launcher.sendall(json.dumps([code, text]).encode())
        launcher.shutdown(socket.SHUT_WR)
        launcher.recv(1)


def describe(command: str, error: BaseException) -> tuple[int, str]:
    """The exit code of a process that an exception ends, and what it has to say."""
    name = f"diffengine {command}"
    match error:
        case UserError():
            first, *more = error.lines
            return 2, "\n".join([f"{name}: error: {one_line(first)}", *map(printable, more)])
        case Interrupted():
            return exit_code(error.signum), f"{name}: {error}" + RESUME * (command == "train")
        case KeyboardInterrupt():
            return 130, f"{name}: stopped at once"
        case SystemExit(code=int(code)):
            return code, f"{name}: stopped at once"
    lines = traceback.format_exception(error)
    return 1, f"{''.join(lines)}{name}: failed: {type(error).__name__}: {error}"


# ------------------------------------------------------------------------------------------------- signals


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Outside the training loop, SIGTERM leaves through `finally`; SIGUSR1, Slurm's warning, is taken as a SIGTERM."""

    def leave(signum: int, frame: Any) -> None:
        raise SystemExit(last_exit_code(signum))

    def as_sigterm(signum: int, frame: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    handlers = {signal.SIGTERM: leave, signal.SIGUSR1: as_sigterm}
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, handler)


def last_exit_code(signum: int) -> int:
    """`exit_code` of a process that is about to leave: no signal may change it until a requeue.

    When the first task of a Slurm job has left, srun sends SIGTERM to the others.
    """
    code = exit_code(signum)
    if code == REQUEUE:
        for ignored in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(ignored, signal.SIG_IGN)
    return code


def exit_code(signum: int) -> int:
    """The exit code of a process that a signal stopped in good order.

    In a Slurm job a SIGTERM comes before the job is pre-empted: its own code says that it is worth a requeue. A rank
    that was killed does not end with it, and all ranks agree on it, whichever of them got a signal.
    """
    return REQUEUE if signum == signal.SIGTERM and "SLURM_JOB_ID" in os.environ else 128 + signum


# ----------------------------------------------------------------------------------------------- processes


def processes_asked() -> bool:
    """Whether the environment asks for several processes."""
    return any(name in os.environ for name in ("NPROC_PER_NODE", "NNODES"))


@dataclass
class Rank:
    """A process of this machine, and what it reported, as of `describe`."""

    number: int
    process: subprocess.Popen
    channel: socket.socket
    report: tuple[int, str] | None = None

    @property
    def running(self) -> bool:
        """False once it ended or reported; after its report it waits for the launcher."""
        return self.process.poll() is None and self.report is None

    @property
    def died(self) -> bool:
        """Whether it ended without a report, as nothing but a kill, a crash or `os._exit` does."""
        return self.report is None and self.process.returncode not in (None, 0)


def launch(command: str, argv: Sequence[str], work_dir: Path) -> int:
    """Run this command in several processes, which get the signals that this one gets; the exit code of the cause.

    A rank that fails stays alive, so that it makes no other fail, until all have ended. So a rank that died is
    the cause of the others' reports, and if none died, it is the first report with the lowest code.
    """
    ranks: list[Rank] = []
    before = {signum: signal.getsignal(signum) for signum in STOPPING}
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # inherited, until a rank can handle them
    try:
        for signum in STOPPING:
            signal.signal(signum, lambda signum, frame: _pass_on(ranks, signum))
        with _free_port() as port:
            ranks += [_start(argv, env) for env in rank_environments(port)]
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
            return _explain(command, _wait(ranks), work_dir)
    finally:
        _end(ranks)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _free_port() -> Iterator[int]:
    """A port that stays reserved for rank 0, which may listen on it since this socket does not."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def rank_environments(free_port: int) -> list[dict[str, str]]:
    """torch's variables for each process of this machine, from NPROC_PER_NODE, NNODES, NODE_RANK, ADDR and PORT."""
    from diffengine.distributed import MOST, whole

    env, most = os.environ, max(16, os.cpu_count() or 1)  # more processes than cores and GPUs take all memory
    nodes, node = whole("NNODES", 1, MOST, 1), whole("NODE_RANK", 0, MOST, 0)
    local = whole("NPROC_PER_NODE", 1, most, 1)
    address = env.get("MASTER_ADDR") or env.get("ADDR")
    port = env.get("MASTER_PORT") or env.get("PORT") or str(free_port if nodes == 1 else 29500)
    require(nodes == 1 or bool(address), f"NNODES={nodes} got no MASTER_ADDR; set it to the machine with NODE_RANK=0")
    require(node < nodes, f"NODE_RANK got {node}; expected less than NNODES={nodes}")
    shared = {
        "MASTER_ADDR": address or "127.0.0.1", "MASTER_PORT": port,
        "WORLD_SIZE": str(nodes * local), "LOCAL_WORLD_SIZE": str(local),
    }  # fmt: skip
    if local > 1:  # as torchrun does: the processes share the cores
        shared["OMP_NUM_THREADS"] = env.get("OMP_NUM_THREADS", "1")
    return [{**shared, "RANK": str(node * local + index), "LOCAL_RANK": str(index)} for index in range(local)]


def _start(argv: Sequence[str], env: Mapping[str, str]) -> Rank:
    """Start a rank in a new session: the terminal sends a Ctrl-C to the launcher alone."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [*COMMAND, *argv],
            env={**os.environ, **env, LAUNCHED: f"{os.getpid()} {theirs.fileno()}"},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    return Rank(int(env["RANK"]), process, ours)


def _pass_on(ranks: Sequence[Rank], signum: int) -> None:
    for rank in ranks:
        if rank.running:
            rank.process.send_signal(signum)


def _wait(ranks: Sequence[Rank]) -> Rank | None:
    """Wait until all ranks have ended, or GRACE seconds after one failed; return the one to blame, or None."""
    reported: list[Rank] = []
    deadline = math.inf
    while (running := [rank for rank in ranks if rank.running]) and time.monotonic() < deadline:
        ready = select([rank.channel for rank in running], [], [], 0.1)[0]
        for rank in running:
            if rank.channel in ready and (message := rank.channel.makefile().read()):
                rank.report = tuple(json.loads(message))
                reported.append(rank)
        if reported or any(rank.died for rank in ranks):
            deadline = min(deadline, time.monotonic() + GRACE)
    died = [rank for rank in ranks if rank.died]
    return died[0] if died else min(reported, key=lambda rank: rank.report or (0, ""), default=None)


def _end(ranks: Sequence[Rank]) -> None:
    """Let the ranks that reported end, and kill those that have not."""
    for rank in ranks:
        rank.channel.close()
        try:
            rank.process.wait(0 if rank.running else 2)
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()


def _explain(command: str, cause: Rank | None, work_dir: Path) -> int:
    """Print why a command failed; return its exit code, as a shell has it."""
    if cause is None:
        return 0
    code, text = cause.report or _death(command, cause, work_dir)
    say(*text.split("\n"), file=sys.stderr)
    return code


def _death(command: str, rank: Rank, work_dir: Path) -> tuple[int, str]:
    """The exit code and the line for a rank that died."""
    code = rank.process.returncode
    host = f" on {socket.gethostname()}" if os.environ.get("NNODES", "1") != "1" else ""
    text = f"diffengine {command}: failed: rank {rank.number}{host} {how_it_ended(code)}"
    if command == "train":
        text += f"; the log is '{work_dir / 'log.txt'}'{RESUME}"
    return (128 - code if code < 0 else code), text
