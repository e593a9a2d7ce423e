"""Running a command over a config: in this process, or by torchrun in as many as the environment asks for."""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffengine.errors import Interrupted, UserError, disk_errors, require
from diffengine.text import one_line

if TYPE_CHECKING:
    from diffengine.engine.build import Job

LAUNCHED = "DIFFENGINE_LAUNCHED"  # set for the processes that `launch` starts: it reports for them


def arguments(parser: argparse.ArgumentParser) -> None:
    """What names a config, changes it, and says how processes are started."""
    add = parser.add_argument
    add("config", help="a shipped name (see list-cfg) or the path of a config file")
    add("--data", help="images: a folder, a parquet file or a hub name (sets `data`)")
    add("--pretrained", help="a model folder or hub name (sets `pretrained`)")
    add("--work-dir", help="the run's folder; default work_dirs/<config name>")
    example = "set anything in the config: batch_size=4 optim_wrapper.clip_grad=None"
    add("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=example)
    add("--launcher", choices=("none", "pytorch", "slurm"), default="none")


def run_job(options: argparse.Namespace, work: Callable[["Job"], object]) -> int:
    """Do `work` over the config that the options name, in every process; return the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a worker's fork
    if LAUNCHED not in os.environ:
        return _run_job(options, work)
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        with disk_errors():
            return _run_job(options, work)
    except UserError as error:
        get_error_handler().record_exception(UserError(str(error)))  # `launch` prints it, also a PeerError
        return 2


def _run_job(options: argparse.Namespace, work: Callable[["Job"], object]) -> int:
    """Run the job in this process, or in the processes that `launch` starts; raises UserError."""
    from diffengine import distributed
    from diffengine.engine.build import load_config, make_job
    from diffengine.models.loading import quiet_libraries
    from diffengine.registry import import_from_here

    import_from_here()
    flags = {"data": options.data, "pretrained": options.pretrained, "work_dir": options.work_dir}
    loaded = load_config(options.config, options.cfg_options, flags)
    try:
        if processes_asked() and "RANK" not in os.environ and options.launcher == "none":
            return launch(options.command, options.argv)
        quiet_libraries()
        work(make_job(options.config, *loaded, distributed.start(options.launcher)))
    except Interrupted as error:
        if LAUNCHED not in os.environ:
            advice = "; continue with --resume" if options.command == "train" else ""
            print(f"diffengine {options.command}: {error}{advice}", file=sys.stderr)
        return 128 + error.signum
    finally:
        distributed.stop()
    return 0


def processes_asked() -> bool:
    """Whether the environment asks for several processes."""
    return any(name in os.environ for name in ("NPROC_PER_NODE", "NNODES"))


def launch(command: str, argv: list[str]) -> int:
    """Run this command in processes of torchrun, which passes signals on; the exit code of the first that failed."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")  # seconds to finish the step and save
    logging.disable(logging.ERROR)  # torchrun's own report of what is printed below
    os.environ[LAUNCHED] = "1"
    try:
        with tempfile.TemporaryDirectory(prefix="diffengine-") as logs:
            torchrun.run(torchrun.parse_args([*torchrun_arguments(), f"--log-dir={logs}", "-m", "diffengine", *argv]))
    except SignalException as error:
        raise Interrupted(error.sigval) from error
    except ChildFailedError as error:
        return report(command, error)
    finally:
        logging.disable(logging.NOTSET)
        del os.environ[LAUNCHED]
    return 0


def torchrun_arguments() -> list[str]:
    """torchrun's options, from the environment's NPROC_PER_NODE, NNODES, NODE_RANK, ADDR and PORT."""
    env = os.environ

    def whole(name: str, smallest: int) -> int:
        text = env.get(name, str(smallest))
        valid = text.isdecimal() and int(text) >= smallest
        require(valid, f"{name} got '{text}'; expected a whole number of at least {smallest}")
        return int(text)

    nodes, node = whole("NNODES", 1), whole("NODE_RANK", 0)
    address = env.get("MASTER_ADDR") or env.get("ADDR")
    port = env.get("MASTER_PORT") or env.get("PORT")
    processes = [f"--nnodes={nodes}", f"--nproc-per-node={whole('NPROC_PER_NODE', 1)}"]
    if nodes == 1 and not port:
        return [*processes, "--standalone"]
    require(nodes == 1 or bool(address), f"NNODES={nodes} got no MASTER_ADDR; set it to the machine with NODE_RANK=0")
    require(node < nodes, f"NODE_RANK got {node}; expected less than NNODES={nodes}")
    addresses = [f"--master-addr={address or '127.0.0.1'}", f"--master-port={port or 29500}"]
    return [*processes, *addresses, f"--node-rank={node}"]


def report(command: str, error: Any) -> int:
    """Print why the first process of a ChildFailedError failed; return its exit code, as a shell has it."""
    rank, failure = error.get_first_failure()
    code, message = failure.exitcode, failure.message
    if code == 2 and not isinstance(message, str):
        text = one_line(message["message"].removeprefix("UserError: "))
        print(f"diffengine {command}: error: {text}", file=sys.stderr)
        return 2
    why = message if code < 0 else f"exit code {code}, see above"
    print(f"diffengine {command}: failed: process {rank}: {why}", file=sys.stderr)
    return 128 - code if code < 0 else code
