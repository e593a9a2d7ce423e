"""Take a config's first steps, and say what time, memory and disk all of it will take.

Nothing is generated, nothing stays, and the work dir may be in use.
"""

import argparse
from typing import TYPE_CHECKING

from diffengine.commands import launch
from diffengine.text import format_bytes, format_duration

if TYPE_CHECKING:
    from diffengine.engine.build import Job
    from diffengine.engine.check import Report


def arguments(parser: argparse.ArgumentParser) -> None:
    launch.arguments(parser)


def run(options: argparse.Namespace) -> int:
    return launch.run(options, check)


def check(job: "Job", options: argparse.Namespace) -> None:
    from diffengine.distributed import print_once
    from diffengine.engine.check import check

    report = check(job)
    print_once("\n".join([*table(report), *(f"warning: {line}" for line in warnings(report))]))


def table(report: "Report") -> list[str]:
    """One number per line: its name, the number, and what to know of it."""
    from datetime import datetime, timedelta

    seconds, memory, clock, cache = report.seconds, report.memory, report.clock, report.cache
    building = cache["seconds"] if isinstance(cache, dict) else 0.0
    end = datetime.now() + timedelta(seconds=building + report.training)
    missing = f", {report.missing} of them to be generated before training" if report.missing else ""
    epochs = clock.max_iters * clock.batch_size / clock.num_samples
    names = {"data": "data", "prepare": "prepare", "forward_backward": "forward, backward", "optimizer": "optimizer"}
    rows = [
        ("images", f"{report.images:,}{missing}"),
        ("steps", f"{clock.max_iters:,} of {clock.batch_size} images: {epochs:.4g} epochs"),
        ("images at once", f"{report.images_at_once}"),
        ("trained", f"{report.parameters:,} parameters"),
        ("runs in", report.description),
        ("", ""),
        ("a step", f"{report.step:.3g} s, {clock.batch_size / report.step:.3g} images/s"),
        *((f"  {name}", f"{seconds[key]:.3g} s") for key, name in names.items()),
        ("  the first step", f"{report.first_step:.3g} s"),
        ("", ""),
        ("peak memory", f"{format_bytes(report.peak)} of {format_bytes(report.available)}, without previews"),
        *((f"  {name}", format_bytes(size)) for name, size in memory.items() if size),
        ("", ""),
        ("a checkpoint", format_bytes(report.checkpoint)),
        ("checkpoints", f"{format_bytes(report.checkpoint * report.checkpoints)}: {report.checkpoints} at a time"),
    ]
    if isinstance(cache, str):
        rows.append(("token cache", f"none: {cache}"))
    else:
        there = ", exists already" if cache["exists"] else ""
        rows.append(("token cache", f"{format_bytes(cache['bytes'])} in {cache['folder']}{there}"))
        rows.append(("  holds", f"{cache['rows']:,} variations of images, {cache['captions']:,} captions"))
    rows.append(("free on disk", format_bytes(report.free)))
    if report.cache_free is not None:
        rows.append(("  for the cache", format_bytes(report.cache_free)))
    rows.append(("", ""))
    if building:
        rows.append(("building the cache", format_duration(building)))
    rows.append(("training", f"{format_duration(report.training)}, without previews and checkpoints"))
    rows.append(("done at", f"{end:%Y-%m-%d %H:%M}, if started now"))
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {value}".rstrip() for name, value in rows]


def warnings(report: "Report") -> list[str]:
    """What will not work, each with what to do about it."""
    lines, cache = [], report.cache
    if report.halved:
        lines.append(
            f"memory ran out with more than {report.images_at_once} images at once: training will split its steps "
            f"alike; set micro_batch_size={report.images_at_once} to start with it"
        )
    if report.peak > report.available:
        lines.append(
            f"{format_bytes(report.peak)} of memory are more than the {format_bytes(report.available)} that there are: "
            "lower micro_batch_size, or set model.gradient_checkpointing=True"
        )
    kept = cache["bytes"] if isinstance(cache, dict) and not cache["exists"] else 0
    building = 2 * kept  # its chunks, and then the whole table
    checkpoints = report.checkpoint * report.checkpoints
    has = f"the disk has {format_bytes(report.free)} free, and"
    if report.cache_free is None:
        needed = max(building, kept + checkpoints)
        if needed > report.free:
            lines.append(
                f"{has} {format_bytes(needed)} are needed: keep fewer checkpoints, or choose another --work-dir"
            )
        return lines
    if checkpoints > report.free:
        lines.append(f"{has} checkpoints need {format_bytes(checkpoints)}: keep fewer, or choose another --work-dir")
    if building > report.cache_free:
        lines.append(
            f"the cache's disk has {format_bytes(report.cache_free)} free, and {format_bytes(building)} are needed to "
            "build it: set cache_path to another disk, or cache=False"
        )
    return lines
