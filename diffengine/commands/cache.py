"""Encode a config's images and captions ahead of training, into its token cache."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from diffengine.commands import launch
from diffengine.errors import UserError

if TYPE_CHECKING:
    from diffengine.engine.build import Job


def arguments(parser: argparse.ArgumentParser) -> None:
    launch.arguments(parser)


def run(options: argparse.Namespace) -> int:
    return launch.run(options, lambda job, options: build_cache(job))


def build_cache(job: "Job") -> None:
    """Build a job's token cache, unless it is up to date.

    Raises:
        UserError: the config has none, or it cannot be built.
    """
    from diffengine.engine.run import build_training

    section = job.resolved.get("token_cache", {})
    if section.get("use") is False:
        raise UserError("this config trains without a token cache: set cache=True or cache=auto")
    build_training(replace(job, resolved={**job.resolved, "token_cache": {**section, "use": True}}))
