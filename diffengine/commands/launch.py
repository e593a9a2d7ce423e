"""Running a command over a config: in this process, or by torchrun in as many as the environment asks for."""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffengine.errors import Interrupted, UserError, disk_errors
from diffengine.text import one_line

if TYPE_CHECKING:
    from diffengine.engine.build import Job

LAUNCHED = "DIFFENGINE_LAUNCHED"  # set for the processes that `launch` starts: it reports for them

Work = Callable[["Job", argparse.Namespace], object]


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


def run(options: argparse.Namespace, work: Work) -> int:
    """Do `work` over the config that the options name, in every process; return the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a worker's fork
    if LAUNCHED in os.environ:
        return _run_launched(options, work)
    loaded = _load(options)
    if processes_asked() and "RANK" not in os.environ and options.launcher == "none":
        return launch(options.command, options.argv)
    return _work(options, work, *loaded)


def processes_asked() -> bool:
    """Whether the environment asks for several processes."""
    return any(name in os.environ for name in ("NPROC_PER_NODE", "NNODES"))


def _load(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    from diffengine.engine.build import load_config
    from diffengine.registry import import_from_here

    import_from_here()
    flags = {"data": options.data, "pretrained": options.pretrained, "work_dir": options.work_dir}
    return load_config(options.config, options.cfg_options, flags)


def _work(options: argparse.Namespace, work: Work, config: dict[str, Any], resolved: dict[str, Any]) -> int:
    """This process's share."""
    from diffengine import distributed
    from diffengine.engine.build import make_job
    from diffengine.models.loading import quiet_libraries

    quiet_libraries()
    try:
        work(make_job(options.config, config, resolved, distributed.start(options.launcher)), options)
    except Interrupted as error:
        if LAUNCHED not in os.environ:
            print(f"diffengine {options.command}: {error}{_how_to_continue(options.command)}", file=sys.stderr)
        return 128 + error.signum
    finally:
        distributed.stop()
    return 0


def _how_to_continue(command: str) -> str:
    return "; continue with --resume" if command == "train" else ""


def launch(command: str, argv: list[str]) -> int:
    """Run this command in several processes by torchrun, which passes signals on to them.

    Returns:
        The exit code of the first process that failed; its error is printed here, once.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")  # seconds to finish the step and save
    logging.disable(logging.ERROR)  # torchrun's own report of what is printed below
    try:
        with tempfile.TemporaryDirectory(prefix="diffengine-") as logs:
            torchrun.run(torchrun.parse_args([*torchrun_arguments(), f"--log-dir={logs}", "-m", "diffengine", *argv]))
    except SignalException as error:
        print(f"diffengine {command}: stopped by {error.sigval.name}{_how_to_continue(command)}", file=sys.stderr)
        return 128 + error.sigval
    except ChildFailedError as error:
        return report(command, error)
    finally:
        logging.disable(logging.NOTSET)
        del os.environ[LAUNCHED]
    return 0


def torchrun_arguments() -> list[str]:
    """torchrun's options, from the environment's NPROC_PER_NODE, NNODES, NODE_RANK, ADDR and PORT.

    Raises:
        UserError: they are no numbers, or the address of the first machine is missing.
    """
    env = os.environ

    def whole(name: str, default: int, smallest: int) -> int:
        text = env.get(name, str(default))
        if not text.isdecimal() or int(text) < smallest:
            raise UserError(f"{name} got '{text}'; expected a whole number of at least {smallest}")
        return int(text)

    nodes, node = whole("NNODES", 1, 1), whole("NODE_RANK", 0, 0)
    address = env.get("MASTER_ADDR") or env.get("ADDR")
    port = env.get("MASTER_PORT") or env.get("PORT")
    processes = [f"--nnodes={nodes}", f"--nproc-per-node={whole('NPROC_PER_NODE', 1, 1)}"]
    if nodes == 1 and not port:
        return [*processes, "--standalone"]
    if nodes > 1 and not address:
        raise UserError(f"NNODES={nodes} got no MASTER_ADDR; set it to the machine with NODE_RANK=0")
    if node >= nodes:
        raise UserError(f"NODE_RANK got {node}; expected less than NNODES={nodes}")
    rendezvous = [f"--master-addr={address or '127.0.0.1'}", f"--master-port={port or 29500}"]
    return [*processes, *rendezvous, f"--node-rank={node}"]


def _run_launched(options: argparse.Namespace, work: Work) -> int:
    """`run` in a process of `launch`: an error is not printed by each process, but recorded for `launch` to print."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        with disk_errors():
            return _work(options, work, *_load(options))
    except UserError as error:
        get_error_handler().record_exception(UserError(str(error)))  # also an error that another process reports
        return 2


def report(command: str, error: Any) -> int:
    """Print why the first process of a ChildFailedError failed; return its exit code, as a shell has it."""
    rank, failure = error.get_first_failure()
    if failure.exitcode == 2 and not isinstance(failure.message, str):
        message = failure.message["message"].removeprefix("UserError: ")
        print(f"diffengine {command}: error: {one_line(message)}", file=sys.stderr)
        return 2
    signalled = failure.exitcode < 0
    why = failure.message if signalled else f"exit code {failure.exitcode}, see above"
    print(f"diffengine {command}: failed: process {rank}: {why}", file=sys.stderr)
    return 128 - failure.exitcode if signalled else failure.exitcode
