"""Seconds per generated image and peak memory, compared with AmusedPipeline.

    python -m benchmarks.sampling --size emoji --batch 1 64 --guidance 1 2
    python -m benchmarks.sampling --size tiny mid --resolution 256 512 --batch 1 8
    python -m benchmarks.sampling --size full --steps 2 --repeats 1

Both generate with the same modules in one process and take turns; AmusedPipeline gets all prompts of a batch at once.
Each run has new prompts, so no text is encoded before. Emoji is the model of `amused_32_emoji`: 32 px, 8x8 tokens.
"""

import argparse
import itertools
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AmusedPipeline, UVit2DModel

from benchmarks import common
from diffengine.engine.build import load_config
from diffengine.export import DTYPES
from diffengine.models.amused.components import Components
from diffengine.models.amused.sampler import AmusedSampler
from diffengine.models.amused.vocabulary import learn_vocabulary
from diffengine.models.generation import GenerationOptions, ImageRequest

EMOJI = "emoji"
MODES = ("AmusedPipeline", "ours")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
Generate = Callable[[list[str], int], None]


def make_emoji_pipeline() -> AmusedPipeline:
    """A pipeline of the sizes of `vq_32_emoji` and `amused_32_emoji`, with random weights."""
    sizes = load_config("amused_32_emoji")[1]["model"]
    origins = {name: sizes[name] for name in ("tokenizer", "text_encoder", "transformer")}
    origins["vqvae"] = load_config("vq_32_emoji")[1]["model"]["vqvae"]
    size, length = origins["tokenizer"]["vocab_size"], origins["tokenizer"]["max_length"]
    vocabulary = learn_vocabulary(["a cat on a blue background"], size, length)
    components = Components(None, origins, vocabulary, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = UVit2DModel.from_config(components.transformer_config).eval()  # with a head that is not zero
    return AmusedPipeline(
        vqvae=components.load("vqvae").eval(), tokenizer=components.tokenizer,
        text_encoder=components.load("text_encoder").eval(), transformer=transformer, scheduler=components.scheduler,
    )  # fmt: skip


def generators(pipeline: AmusedPipeline, guidance: float, steps: int) -> dict[str, Generate]:
    """By mode, what generates an image per prompt."""
    pipeline.set_progress_bar_config(disable=True)
    sampler = AmusedSampler(**pipeline.components, graphs=True)
    options = GenerationOptions(guidance, steps)

    def theirs(prompts: list[str], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        pipeline(prompts, guidance_scale=guidance, num_inference_steps=steps, generator=generator)

    def ours(prompts: list[str], seed: int) -> None:
        requests = [ImageRequest(prompt, seed + number) for number, prompt in enumerate(prompts)]
        list(sampler.generate(requests, options))

    return dict(zip(MODES, (theirs, ours)))


def timed(generate: Generate, prompts: list[str], seed: int) -> tuple[float, float]:
    """Seconds, and the peak GB meanwhile: that torch allocated on a GPU, or that the process held."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        CLEAR.write_text("5")  # Linux then counts the peak from here
    started = time.perf_counter()
    generate(prompts, seed)
    seconds = time.perf_counter() - started  # images are on the host, so the device has finished
    if torch.cuda.is_available():
        return seconds, torch.cuda.max_memory_allocated() / 1e9
    peak = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert peak is not None
    return seconds, int(peak[1]) * 1024 / 1e9


def compare(table: common.Table, pipeline: AmusedPipeline, size: str, options: argparse.Namespace) -> None:
    """Print the rows of one model: for each batch and guidance, the two sides in turns."""
    side = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    numbers = itertools.count()
    for batch, guidance in itertools.product(options.batch, options.guidance):
        sides = generators(pipeline, guidance, options.steps)
        runs: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
        for repeat in range(-options.warm_up, options.repeats):
            for mode in MODES:
                prompts = [f"cat {next(numbers)}" for _ in range(batch)]
                run = timed(sides[mode], prompts, seed=0)
                if repeat >= 0:
                    runs[mode].append(run)
        seconds = {mode: [run[0] / batch for run in runs[mode]] for mode in MODES}
        for mode in MODES:
            speedup = statistics.median(seconds[MODES[0]]) / statistics.median(seconds[mode])
            memory = max(run[1] for run in runs[mode])
            table.row(
                size, side, batch, f"{guidance:g}", options.steps, mode, common.spread(seconds[mode]),
                f"{speedup:.2f}", f"{memory:.2f}",
            )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--size", nargs="+", choices=(*common.SIZES, EMOJI), default=["tiny"])
    parser.add_argument("--resolution", nargs="+", type=int, choices=(256, 512), default=[512], help="not of emoji")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="prompts at once")
    parser.add_argument("--guidance", nargs="+", type=float, default=[10.0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--warm-up", type=int, default=1, help="untimed runs of each side")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side, in turns")
    options = parser.parse_args(arguments)
    dtype = options.dtype or ("bf16" if torch.cuda.is_available() else "fp32")
    print(f"{options.repeats} runs after {options.warm_up}, in {dtype}, on {common.machine()}\n")
    table = common.Table("size", "px", "batch", "guidance", "steps", "mode", "s/image", "speedup", "peak GB")
    for size in options.size:
        for resolution in options.resolution[: 1 if size == EMOJI else None]:
            pipeline = make_emoji_pipeline() if size == EMOJI else common.make_pipeline(size, resolution)
            pipeline.vqvae.to(common.DEVICE)
            for module in (pipeline.text_encoder, pipeline.transformer):
                module.to(common.DEVICE, DTYPES[dtype])
            compare(table, pipeline, size, options)


if __name__ == "__main__":
    main()
