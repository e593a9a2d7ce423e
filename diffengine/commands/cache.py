"""Encode a config's images and captions ahead of training, into its token cache."""

import argparse
from typing import TYPE_CHECKING

from diffengine.commands import launch

if TYPE_CHECKING:
    from diffengine.engine.build import Job

arguments = launch.arguments


def run(options: argparse.Namespace) -> int:
    return launch.run_job(options, build_cache)


def build_cache(job: "Job") -> None:
    from diffengine.engine import run

    run.build_cache(job)
