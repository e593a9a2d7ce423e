"""Train a config. With NPROC_PER_NODE set, on several GPUs by torchrun."""

import argparse
import os
import sys

from diffengine.engine import launch


def arguments(parser: argparse.ArgumentParser) -> None:
    launch.arguments(parser)
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume", nargs="?", const="newest", metavar="CKPT",
        help="go on from the run's newest checkpoint, or CKPT",
    )  # fmt: skip
    start.add_argument("--overwrite", action="store_true", help="delete the run that the work dir holds")


def run(options: argparse.Namespace) -> int:
    return launch.run(options, train)


def train(job: launch.Job) -> int:
    """One process's part of the run."""
    from diffengine.engine.assemble import build_run
    from diffengine.engine.loop import Interrupted
    from diffengine.engine.workdir import claim, release

    try:
        resume = claim(job.work_dir, job.options.resume, job.options.overwrite)
        build_run(job.settings, job.resolved, job.name, job.work_dir, job.device, resume).train()
    except Interrupted as error:
        if launch.LAUNCHED not in os.environ:
            print(f"diffengine train: {error}; go on with --resume", file=sys.stderr)
        return 128 + error.signum
    finally:
        release()
    return 0
