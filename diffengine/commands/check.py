"""Take a config's first steps, and say what time, memory and disk all of it will take.

Nothing is drawn and nothing stays, and the work dir may be in use.
"""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from diffengine.engine import launch

if TYPE_CHECKING:
    from diffengine.engine.rehearsal import Figures


def arguments(parser: argparse.ArgumentParser) -> None:
    launch.arguments(parser)


def run(options: argparse.Namespace) -> int:
    return launch.run(options, check)


def check(job: launch.Job) -> int:
    """One process's part of it."""
    from diffengine import distributed
    from diffengine.engine.loop import Interrupted
    from diffengine.engine.rehearsal import rehearse

    try:
        figures = rehearse(job.settings, job.resolved, job.name, job.work_dir, job.device)
    except Interrupted as error:
        if launch.LAUNCHED not in os.environ:
            print(f"diffengine check: {error}", file=sys.stderr)
        return 128 + error.signum
    if distributed.rank() == 0:
        print("\n".join([*table(figures), *(f"warning: {line}" for line in warnings(figures))]), flush=True)
    return 0


def table(figures: "Figures") -> list[str]:
    """One figure a line: what it is of, the figure, and what to know of it."""
    from datetime import datetime, timedelta

    from diffengine.text import format_bytes, format_duration

    seconds, memory, cache = figures.seconds, figures.memory, figures.cache
    building = cache.seconds if cache else 0.0
    checkpoints = figures.checkpoint * figures.checkpoints
    end = datetime.now() + timedelta(seconds=building + figures.training)
    awaited = f", {figures.awaited} of them to be drawn before training" if figures.awaited else ""
    rows = [
        ("images", f"{figures.images:,}{awaited}"),
        ("steps", f"{figures.steps:,} of {figures.batch_size} images: {figures.epochs:.4g} epochs"),
        ("images at once", f"{figures.at_once}"),
        ("trained", f"{figures.parameters:,} parameters"),
        ("runs in", figures.how),
        ("", ""),
        ("a step", f"{seconds.step:.3g} s, {figures.batch_size / seconds.step:.3g} images/s"),
        ("  data", f"{seconds.data:.3g} s"),
        ("  prepare", f"{seconds.prepare:.3g} s" + ("" if cache else ": images and captions to tokens")),
        ("  forward, backward", f"{seconds.passes:.3g} s"),
        ("  optimizer", f"{seconds.optimizer:.3g} s"),
        ("  the first step", f"{seconds.first:.3g} s"),
        ("", ""),
        ("peak memory", f"{format_bytes(figures.peak)} of {format_bytes(figures.available)}, previews apart"),
        ("  trained weights", format_bytes(memory.trained)),
        ("  frozen weights", format_bytes(memory.frozen)),
        ("  gradients", format_bytes(memory.gradients)),
        ("  optimizer", format_bytes(memory.optimizer)),
        *([("  average", format_bytes(memory.average))] if memory.average else []),
        ("  activations", format_bytes(figures.activations)),
        ("", ""),
        ("a checkpoint", format_bytes(figures.checkpoint)),
        ("checkpoints", f"{format_bytes(checkpoints)}: {figures.checkpoints} at a time"),
    ]  # fmt: skip
    if cache is None:
        rows.append(("token cache", f"none: {figures.no_cache}"))
    else:
        rows += [
            ("token cache", f"{format_bytes(cache.size)} in {cache.folder}{', there already' * cache.there}"),
            ("  holds", f"{cache.rows:,} forms of images, {cache.captions:,} captions"),
        ]
    rows.append(("free on disk", format_bytes(figures.free)))
    if figures.free_for_cache is not None:
        rows.append(("  for the cache", format_bytes(figures.free_for_cache)))
    rows.append(("", ""))
    if building:
        rows.append(("building the cache", format_duration(building)))
    rows += [
        ("training", f"{format_duration(figures.training)}, previews and checkpoints apart"),
        ("done at", f"{end:%Y-%m-%d %H:%M}, if started now"),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {value}".rstrip() for name, value in rows]


def warnings(figures: "Figures") -> list[str]:
    """What will not do, each with what to do about it."""
    from diffengine.text import format_bytes

    lines = []
    if figures.halved:
        lines.append(
            f"memory ran out with more than {figures.at_once} images at once: training will split its "
            f"steps alike; set micro_batch_size={figures.at_once} to start with it"
        )
    if figures.peak > figures.available:
        lines.append(
            f"{format_bytes(figures.peak)} of memory are more than the {format_bytes(figures.available)} that "
            "there are: lower micro_batch_size, or set model.gradient_checkpointing=True"
        )
    cache = figures.cache
    building = 2 * cache.size if cache and not cache.there else 0  # its parts, and then the whole
    kept = cache.size if building and cache else 0
    checkpoints = figures.checkpoint * figures.checkpoints
    if figures.free_for_cache is None:
        needed = max(building, kept + checkpoints)
        if needed > figures.free:
            lines.append(
                f"the disk has {format_bytes(figures.free)} free, and {format_bytes(needed)} are needed: keep "
                "fewer checkpoints, or choose another --work-dir"
            )
        return lines
    if checkpoints > figures.free:
        lines.append(
            f"the disk has {format_bytes(figures.free)} free, and checkpoints need {format_bytes(checkpoints)}: "
            "keep fewer, or choose another --work-dir"
        )
    if building > figures.free_for_cache:
        lines.append(
            f"the cache's disk has {format_bytes(figures.free_for_cache)} free, and {format_bytes(building)} are "
            "needed to build it: set cache_path to another disk, or cache=False"
        )
    return lines
