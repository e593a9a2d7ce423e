"""Train a config. With NPROC_PER_NODE set, on several GPUs by torchrun."""

import argparse
from typing import TYPE_CHECKING

from diffengine.commands import launch

if TYPE_CHECKING:
    from diffengine.engine.build import Job


def arguments(parser: argparse.ArgumentParser) -> None:
    launch.arguments(parser)
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume", nargs="?", const="newest", metavar="CKPT",
        help="continue from the run's newest checkpoint, or CKPT",
    )  # fmt: skip
    start.add_argument("--overwrite", action="store_true", help="delete the run that the work dir holds")


def run(options: argparse.Namespace) -> int:
    return launch.run(options, train)


def train(job: "Job", options: argparse.Namespace) -> None:
    from diffengine.engine import run

    run.train(job, options.resume, options.overwrite)
