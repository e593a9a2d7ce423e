"""Train a config. With NPROC_PER_NODE set, on several GPUs by torchrun."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a shipped name (see list-cfg) or the path of a config file")
    parser.add_argument("--data", help="pictures: a folder, a parquet file or a hub name (sets `data`)")
    parser.add_argument("--pretrained", help="a model folder or hub name (sets `pretrained`)")
    parser.add_argument("--work-dir", help="where the run goes; default work_dirs/<config name>")
    parser.add_argument(
        "--resume", nargs="?", const="newest", metavar="CKPT", help="go on from the run's newest checkpoint, or CKPT"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete the run that the work dir holds")
    parser.add_argument(
        "--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="set anything in the config: batch_size=4 optim_wrapper.clip_grad=None",
    )  # fmt: skip
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm"), default="none")


def run(options: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a worker's fork
    from diffengine import config

    flags = {"data": options.data, "pretrained": options.pretrained, "work_dir": options.work_dir}
    settings, resolved = config.load(options.config, options.cfg_options, flags)
    if processes_asked() and "RANK" not in os.environ and options.launcher == "none":
        return launch(options.argv)
    return train(options, settings, resolved)


def processes_asked() -> bool:
    """Whether the environment asks for several processes."""
    return any(name in os.environ for name in ("NPROC_PER_NODE", "NNODES"))


def launch(argv: list[str]) -> int:
    """Start this command again under torchrun of the same Python; its exit code is ours."""
    env = os.environ
    address = env.get("MASTER_ADDR") or env.get("ADDR") or "127.0.0.1"
    port = env.get("MASTER_PORT") or env.get("PORT") or "29500"
    nodes = env.get("NNODES", "1")
    where = ["--standalone"] if nodes == "1" and not (env.get("MASTER_PORT") or env.get("PORT")) else [
        f"--master_addr={address}", f"--master_port={port}", f"--node_rank={env.get('NODE_RANK', '0')}"
    ]  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}",
        f"--nproc_per_node={env.get('NPROC_PER_NODE', '1')}", *where, "-m", "diffengine", *argv, 
    ]  # fmt: skip
    process = subprocess.Popen(command)
    while True:
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code
        except KeyboardInterrupt:
            continue  # torchrun had the same signal; its workers finish the step and save


def train(options: argparse.Namespace, settings: dict[str, Any], resolved: dict[str, Any]) -> int:
    """One process's part of the run."""
    from diffengine.engine import distributed
    from diffengine.engine.assemble import build_run
    from diffengine.engine.loop import Interrupted
    from diffengine.engine.workdir import claim
    from diffengine.models.loading import quiet_libraries

    quiet_libraries()
    name = Path(options.config).stem
    device = distributed.start(options.launcher)
    try:
        work_dir = Path(resolved.get("work_dir") or f"work_dirs/{name}")
        resume = claim(work_dir, options.resume, options.overwrite)
        runner = build_run(settings, resolved, name, work_dir, device, resume)
        runner.train()
    except Interrupted as error:
        print(f"diffengine train: {error}; go on with --resume", file=sys.stderr)
        return 128 + error.signum
    finally:
        distributed.stop()
    return 0

