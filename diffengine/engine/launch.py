"""Running a command over a config: in this process, or by torchrun in as many as the environment asks for."""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffengine.errors import UserError, disk_errors

if TYPE_CHECKING:
    import torch

LAUNCHED = "DIFFENGINE_LAUNCHED"  # set for the processes that `launch` starts: it reports for them


def arguments(parser: argparse.ArgumentParser) -> None:
    """What names a config, changes it, and says how processes are started."""
    parser.add_argument("config", help="a shipped name (see list-cfg) or the path of a config file")
    parser.add_argument("--data", help="images: a folder, a parquet file or a hub name (sets `data`)")
    parser.add_argument("--pretrained", help="a model folder or hub name (sets `pretrained`)")
    parser.add_argument("--work-dir", help="where the run goes; default work_dirs/<config name>")
    parser.add_argument(
        "--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="set anything in the config: batch_size=4 optim_wrapper.clip_grad=None",
    )  # fmt: skip
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm"), default="none")


@dataclass
class Job:
    """What a command over a config is about, in one process.

    Attributes:
        options: of the command line.
        settings, resolved: of `config.load`.
        name: the config's.
        work_dir: where a run of it goes.
        device: this process's.
    """

    options: argparse.Namespace
    settings: dict[str, Any]
    resolved: dict[str, Any]
    name: str
    work_dir: Path
    device: "torch.device"


Work = Callable[[Job], int]


def run(options: argparse.Namespace, work: Work) -> int:
    """`work` over the config that the options name, in every process; the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a worker's fork
    if LAUNCHED in os.environ:
        return _reporting(options, work)
    loaded = _load(options)
    if processes_asked() and "RANK" not in os.environ and options.launcher == "none":
        return launch(options.command, options.argv)
    return _work(options, work, *loaded)


def _work(options: argparse.Namespace, work: Work, settings: dict[str, Any], resolved: dict[str, Any]) -> int:
    """One process's part."""
    from diffengine import distributed
    from diffengine.models.loading import quiet_libraries

    quiet_libraries()
    name = Path(options.config).stem
    work_dir = Path(resolved.get("work_dir") or f"work_dirs/{name}").expanduser()
    try:
        return work(Job(options, settings, resolved, name, work_dir, distributed.start(options.launcher)))
    finally:
        distributed.stop()


def _load(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    from diffengine import config
    from diffengine.registry import import_from_here

    import_from_here()
    flags = {"data": options.data, "pretrained": options.pretrained, "work_dir": options.work_dir}
    return config.load(options.config, options.cfg_options, flags)


def processes_asked() -> bool:
    """Whether the environment asks for several processes."""
    return any(name in os.environ for name in ("NPROC_PER_NODE", "NNODES"))


def launch(command: str, argv: list[str]) -> int:
    """Run this command in several processes by torchrun, which passes signals on to them.

    Its exit code is that of the first process that failed, whose mistake is said here, once.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")  # seconds to finish the step and save
    logging.disable(logging.ERROR)  # torchrun's own report of what is said below
    try:
        with tempfile.TemporaryDirectory(prefix="diffengine-") as logs:
            arguments = [*torchrun_arguments(), f"--log-dir={logs}", "-m", "diffengine", *argv]
            torchrun.run(torchrun.parse_args(arguments))
    except SignalException as error:
        go_on = "; go on with --resume" if command == "train" else ""
        print(f"diffengine {command}: stopped by {error.sigval.name}{go_on}", file=sys.stderr)
        return 128 + error.sigval
    except ChildFailedError as error:
        return report(command, error)
    finally:
        logging.disable(logging.NOTSET)
        del os.environ[LAUNCHED]
    return 0


def torchrun_arguments() -> list[str]:
    """torchrun's options, from the environment's NPROC_PER_NODE, NNODES, NODE_RANK, ADDR and PORT."""
    env = os.environ
    nodes, node = _whole("NNODES", 1, 1), _whole("NODE_RANK", 0, 0)
    address = env.get("MASTER_ADDR") or env.get("ADDR")
    port = env.get("MASTER_PORT") or env.get("PORT")
    processes = [f"--nnodes={nodes}", f"--nproc-per-node={_whole('NPROC_PER_NODE', 1, 1)}"]
    if nodes == 1 and not port:
        return [*processes, "--standalone"]
    if nodes > 1 and not address:
        raise UserError(f"NNODES={nodes} got no MASTER_ADDR; set it to the machine with NODE_RANK=0")
    if node >= nodes:
        raise UserError(f"NODE_RANK got {node}; expected less than NNODES={nodes}")
    where = [f"--master-addr={address or '127.0.0.1'}", f"--master-port={port or 29500}"]
    return [*processes, *where, f"--node-rank={node}"]


def _whole(name: str, default: int, smallest: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < smallest:
        raise UserError(f"{name} got '{text}'; expected a whole number of at least {smallest}")
    return int(text)


def _reporting(options: argparse.Namespace, work: Work) -> int:
    """`work` in a process of `launch`: a mistake is not printed by each, but left for `launch` to say."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        with disk_errors():
            return _work(options, work, *_load(options))
    except UserError as error:
        get_error_handler().record_exception(UserError(str(error)))  # also of one that another process told
        return 2


def report(command: str, error: Any) -> int:
    """Say why the first process of a ChildFailedError failed; its exit code, as a shell has it."""
    rank, failure = error.get_first_failure()
    if failure.exitcode == 2 and not isinstance(failure.message, str):
        mistake = failure.message["message"].removeprefix("UserError: ")
        print(f"diffengine {command}: error: {' '.join(mistake.split())}", file=sys.stderr)
        return 2
    signalled = failure.exitcode < 0
    why = failure.message if signalled else f"exit code {failure.exitcode}, see above"
    print(f"diffengine {command}: failed: process {rank}: {why}", file=sys.stderr)
    return 128 - failure.exitcode if signalled else failure.exitcode
