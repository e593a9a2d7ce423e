"""Measure what models generate: retrieval, CLIP score, FID, in one table for all settings."""

import argparse

from diffengine.commands import sample
from diffengine.errors import require
from diffengine.terminal import say


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", nargs="+", help="as of `diffengine sample`; several are compared")
    add("--data", help="a config, or images as a config's `data`; default: what the first source was trained on")
    add("--split", help="of the data, in place of the one that was trained")
    add("--prompts", metavar="FILE", help="a text file with a prompt per line, in place of data")
    add("--base", help="the pipeline to put what convert wrote on; an adapter names its own")
    add("--guidance", type=float, nargs="+", metavar="SCALE", help="guidance scales; default: what suits each model")
    add("--steps", type=int, nargs="+", default=[12], metavar="STEPS", help="generation steps (default 12)")
    add("--order", nargs="+", choices=("confidence", "halton"), default=["confidence"], help="default confidence")
    add("--n", type=int, default=1, help="images per caption (default 1)")
    add("--max-images", type=int, default=1024, help="at most so many captions, spread over the data (default 1024)")
    add("--seed", type=int, default=0, help="image i uses SEED + i (default 0)")
    add("--resolution", type=int, help="side in pixels; default: each model's own")
    add("--dtype", choices=("auto", "fp32", "fp16", "bf16"), default="auto", help="as of `diffengine sample`")
    add("--compile", action="store_true", help="compile the model: faster for many images")
    add("--clip", help="the CLIP model for the score: a hub name in the local cache, or a folder")
    add("-o", "--output", help="the folder to write to; started again, it goes on (default: eval in the work dir)")


def run(options: argparse.Namespace) -> int:
    sample.check_settings(options)
    require(0 <= options.seed < 2**62, f"--seed got {options.seed}; expected a whole number from 0")
    prompts = sample.read_prompts(options.prompts) if options.prompts else None

    from diffengine.api import evaluate

    known = {"clip": options.clip} if options.clip else {}
    found = evaluate(
        options.source, data=options.data, split=options.split, prompts=prompts, out=options.output, base=options.base,
        guidance=options.guidance or [None], steps=options.steps, order=options.order, per_caption=options.n,
        max_images=options.max_images, seed=options.seed, resolution=options.resolution, dtype=options.dtype,
        compile=options.compile, **known,
    )  # fmt: skip
    say(*found.markdown().split("\n"))
    say(f"wrote eval.md, eval.json, eval.png and all images to {found.folder}")
    return 0
