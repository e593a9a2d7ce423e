"""Encode a config's images and captions ahead of training, into its token cache."""

import argparse

from diffengine.engine import launch
from diffengine.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    launch.arguments(parser)


def run(options: argparse.Namespace) -> int:
    return launch.run(options, cache)


def cache(job: launch.Job) -> int:
    """One process's part of the build."""
    from diffengine.engine.assemble import prepare

    section = job.resolved.get("token_cache", {})
    if section.get("use") is False:
        raise UserError("this config trains without a token cache: set cache=True or cache=auto")
    prepare({**job.resolved, "token_cache": {**section, "use": True}}, job.work_dir, job.device)
    return 0
