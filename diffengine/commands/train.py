"""Train a config. With NPROC_PER_NODE set, on several GPUs."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffengine.commands import launch
from diffengine.errors import require

if TYPE_CHECKING:
    from diffengine.engine.build import Job


def arguments(parser: argparse.ArgumentParser) -> None:
    launch.arguments(parser)
    start = parser.add_mutually_exclusive_group()
    resume = "continue from the run's newest checkpoint, or CKPT"
    start.add_argument("--resume", nargs="?", const="newest", metavar="CKPT", help=resume)
    parser.add_argument("--init-from", metavar="CKPT", help="start a new run from the weights of a checkpoint")
    start.add_argument("--overwrite", action="store_true", help="delete the run that the work dir holds")


def run(options: argparse.Namespace) -> int:
    weights = None if options.init_from is None else Path(options.init_from)
    require(
        not (weights and options.resume),
        "got --init-from and --resume, which continues with the run's weights; leave one out",
    )

    def train(job: "Job") -> None:
        from diffengine.engine import run as runs  # imports torch, without which images are looked at

        runs.train(replace(job, init_from=weights), options.resume, options.overwrite)

    return launch.run_job(options, train)
