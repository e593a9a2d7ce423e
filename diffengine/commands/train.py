"""Train a config. With NPROC_PER_NODE set, on several GPUs by torchrun."""

import argparse

from diffengine.commands import launch


def arguments(parser: argparse.ArgumentParser) -> None:
    launch.arguments(parser)
    start = parser.add_mutually_exclusive_group()
    resume = "continue from the run's newest checkpoint, or CKPT"
    start.add_argument("--resume", nargs="?", const="newest", metavar="CKPT", help=resume)
    start.add_argument("--overwrite", action="store_true", help="delete the run that the work dir holds")


def run(options: argparse.Namespace) -> int:
    from diffengine.engine import run as runs

    return launch.run_job(options, lambda job: runs.train(job, options.resume, options.overwrite))
