"""Encode a config's images and captions ahead of training, into its token cache."""

import argparse

from diffengine.commands import launch

arguments = launch.arguments


def run(options: argparse.Namespace) -> int:
    from diffengine.engine.run import build_cache

    return launch.run_job(options, build_cache)
