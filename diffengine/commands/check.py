"""Take a config's first steps, and report what time, memory and disk all of it will take; nothing stays."""

import argparse
import time
from typing import TYPE_CHECKING

from diffengine.commands import launch
from diffengine.terminal import say
from diffengine.text import format_bytes, format_duration

if TYPE_CHECKING:
    from diffengine.engine.build import Job
    from diffengine.engine.check import Report

arguments = launch.arguments


def run(options: argparse.Namespace) -> int:
    return launch.run_job(options, check)


def check(job: "Job") -> None:
    from diffengine import distributed
    from diffengine.engine.check import check

    report = check(job)
    if distributed.rank() == 0:
        say(*table(report), *(f"warning: {line}" for line in warnings(report)))


def table(report: "Report") -> list[str]:
    """One number per line: its name, the number, and what to know of it."""
    clock, cache = report.clock, report.cache
    building = cache["seconds"] if isinstance(cache, dict) else 0.0
    end = time.localtime(time.time() + building + report.training)
    missing = f", {report.missing} of them to be generated before training" if report.missing else ""
    epochs = clock.max_iters * clock.batch_size / clock.num_samples
    rows = [
        ("images", f"{report.images:,}{missing}"),
        ("steps", f"{clock.max_iters:,} of {clock.batch_size} images: {epochs:.4g} epochs"),
        ("images at once", f"{report.images_at_once}"),
        ("trained", f"{report.parameters:,} parameters"),
        ("runs in", report.description),
        ("", ""),
        ("a step", f"{report.step:.3g} s, {clock.batch_size / report.step:.3g} images/s"),
        *((f"  {name.replace('_', ', ')}", f"{seconds:.3g} s") for name, seconds in report.seconds.items()),
        ("  the first step", f"{report.first_step:.3g} s"),
        ("", ""),
        ("peak memory", f"{format_bytes(report.peak)} of {format_bytes(report.available)}, without previews"),
        *((f"  {name}", format_bytes(size)) for name, size in report.memory.items() if size),
        ("", ""),
        ("a checkpoint", format_bytes(report.checkpoint)),
        ("checkpoints", f"{format_bytes(report.checkpoint * report.checkpoints)}: {report.checkpoints} at a time"),
    ]
    if isinstance(cache, str):
        rows.append(("token cache", f"none: {cache}"))
    else:
        exists = ", exists already" if cache["exists"] else ""
        rows.append(("token cache", f"{format_bytes(cache['bytes'])} in {cache['folder']}{exists}"))
        rows.append(("  holds", f"{cache['rows']:,} variations of images, {cache['captions']:,} captions"))
    rows.append(("free on disk", format_bytes(report.free)))
    if report.cache_free is not None:
        rows.append(("  for the cache", format_bytes(report.cache_free)))
    rows.append(("", ""))
    if building:
        rows.append(("building the cache", format_duration(building)))
    rows.append(("training", f"{format_duration(report.training)}, without previews and checkpoints"))
    rows.append(("done at", time.strftime("%Y-%m-%d %H:%M, if started now", end)))
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {value}".rstrip() for name, value in rows]


def warnings(report: "Report") -> list[str]:
    """What will not work, each with what to do about it."""

    def lack(free: int, needed: int) -> str:
        return f"has {format_bytes(free)} free, and {format_bytes(needed)} are needed"

    lines, cache, most = [], report.cache, report.images_at_once
    if report.halved:
        lines.append(
            f"memory ran out above {most} images at once, so steps are split: set --cfg-options micro_batch_size={most}"
        )
    if report.peak > report.available:
        peak, available = format_bytes(report.peak), format_bytes(report.available)
        advice = "lower micro_batch_size, or set --cfg-options model.gradient_checkpointing=True"
        lines.append(f"{peak} of memory are more than the {available} that there are: {advice}")
    kept = cache["bytes"] if isinstance(cache, dict) and not cache["exists"] else 0
    building = 2 * kept  # its chunks, and then the whole table
    checkpoints = report.checkpoint * report.checkpoints
    needed = max(building, kept + checkpoints) if report.cache_free is None else checkpoints
    if needed > report.free:
        lines.append(f"the disk {lack(report.free, needed)}: keep fewer checkpoints, or choose another --work-dir")
    if report.cache_free is not None and building > report.cache_free:
        lines.append(
            f"the cache's disk {lack(report.cache_free, building)}: set a cache_path, or --cfg-options cache=False"
        )
    return lines
