"""Images per second and peak memory, beside the reference script of diffusers.

    python -m benchmarks.throughput PATH/train_amused.py --size full --resolution 512 --batch 1
    python -m benchmarks.throughput --size tiny mid --batch 1 8   # ours alone

Both train all of the transformer on the same images and weights, with the same batch, precision, clipping
and workers, each as its own command line starts it. Runs take turns, and what is timed is the time from the
end of one optimizer step to the end of the next.

The last column is what the transformer's forward and backward make of the rate at which this device
multiplies large matrices, as measured at the start.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import UVit2DModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.common import Timings

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAYS = ("reference", "online", "cached")


def arithmetic(size: str, resolution: int) -> float:
    """Floating-point operations of the transformer, forward and backward, for one image."""
    sizes = common.transformer_sizes(size, resolution)
    side = sizes["sample_size"]
    with torch.device("meta"):
        transformer = UVit2DModel(**sizes)
        ids = torch.zeros(1, side, side, dtype=torch.long)
        hidden = torch.zeros(1, 77, sizes["encoder_hidden_size"])
        pooled, micro_conds = torch.zeros(1, sizes["cond_embed_dim"]), torch.zeros(1, 5)
        with FlopCounterMode(display=False) as counter:
            transformer(ids, hidden, pooled, micro_conds).sum().backward()
    return counter.get_total_flops()


def matrix_rate(precision: str) -> float:
    """Floating-point operations per second of a large matrix product, the best of ten."""
    gpu = torch.cuda.is_available()
    side = 8192 if gpu else 1024
    torch.backends.cuda.matmul.allow_tf32 = True  # as both sides do
    a = torch.ones(side, side, dtype=PRECISIONS[precision], device=common.DEVICE)
    seconds = []
    for _ in range(11):
        started = time.perf_counter()
        a @ a
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds[1:])


def reference(script: Path, model: Path, data: Path, out: Path, options: argparse.Namespace) -> list[str]:
    """The reference's command line: what `ours` does, as far as it can.

    It has no mirroring, and dies of caption dropout. Its images come from the same folder by `datasets`.
    Of trackers it gets one that is not installed, so none: TensorBoard's dies of the script's options.
    """
    return [
        str(script), "--pretrained_model_name_or_path", str(model), "--instance_data_dataset", str(data),
        "--image_key", "image", "--prompt_key", "text", "--output_dir", str(out),
        "--resolution", str(options.resolution), "--train_batch_size", str(options.batch),
        "--mixed_precision", {"fp32": "no"}.get(options.precision, options.precision), "--allow_tf32",
        "--learning_rate", "1e-4", "--lr_scheduler", "constant", "--adam_weight_decay", "1e-2",
        "--max_grad_norm", "1.0", "--dataloader_num_workers", str(options.workers), "--seed", "0",
        "--max_train_steps", "1000", "--logging_steps", "1000", "--checkpointing_steps", "1000",
        "--validation_steps", "1000", "--report_to", "dvclive",
    ]  # fmt: skip


def ours(way: str, cache: Path, options: argparse.Namespace) -> list[str]:
    """Our settings: a recipe's, without what the reference cannot do. It is stopped long before its end."""
    return [
        "--cfg-options", *common.STEPS_ONLY, f"batch_size={options.batch}", "learning_rate=1e-4",
        "caption_dropout=0.0", f"precision={options.precision}", f"num_workers={options.workers}",
        "max_iters=1000", "log_every=1000", *common.tokens(way, cache),
        *options.cfg_options,
    ]  # fmt: skip


def measure(way: str, model: Path, data: Path, scratch: Path, options: argparse.Namespace) -> Timings | str:
    """One run. A cache is built ahead of the first one that needs it, and is not timed."""
    steps = options.warm_up + options.steps
    if way == "reference":
        command = reference(options.script, model, data, scratch / way, options)
        return common.timed(command, steps, options.python, HF_DATASETS_CACHE=str(scratch / "datasets"))
    config, cache = f"amused_{options.resolution}_own", scratch / "cache"
    settings = ours(way, cache, options)
    if way == "cached" and not cache.exists():
        build = common.diffengine("cache", config, model, data, scratch / way, *settings)
        if problem := common.python(*build):
            return problem
    train = common.diffengine("train", config, model, data, scratch / way, "--overwrite", *settings)
    return common.timed(train, steps)


def compare(table: common.Table, model: Path, data: Path, scratch: Path, options: argparse.Namespace) -> None:
    """The rows of one size, resolution and batch."""
    ways = [way for way in options.ways if way != "reference" or options.script]
    runs: dict[str, list[Timings | str]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way in ways:
            runs[way].append(measure(way, model, data, scratch, options))
    slowest = None
    for way in ways:
        problems = [run for run in runs[way] if isinstance(run, str)]
        good = [run for run in runs[way] if isinstance(run, Timings)]
        cell = (options.size, options.resolution, options.batch, options.precision, way)
        if problems:
            table.row(*cell, problems[0].replace("|", "/"), *[""] * 4)
            continue
        if any(run.torch != torch.__version__ for run in good):
            raise SystemExit(f"the reference ran with torch {good[0].torch}; expected {torch.__version__}")
        seconds = [value for run in good for value in run.seconds[options.warm_up - 1 :]]
        per_second = options.batch / statistics.median(seconds)
        slowest = per_second if way == "reference" else slowest
        times = f"{per_second / slowest:.2f}" if slowest else ""
        memory = max(run.memory_gb for run in good)
        share = per_second * arithmetic(options.size, options.resolution) / options.matrix_rate
        table.row(*cell, common.spread(seconds), f"{per_second:.3g}", times, f"{memory:.2f}", f"{share:.1%}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("script", nargs="?", type=Path, help="the reference's train_amused.py")
    parser.add_argument("--python", default=sys.executable, help="that has what the script needs: torchvision")
    parser.add_argument("--size", nargs="+", choices=common.SIZES, default=["tiny"])
    parser.add_argument("--resolution", nargs="+", type=int, choices=(256, 512), default=[512])
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="images per step")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--precision", choices=list(PRECISIONS), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of each run that are not counted")
    parser.add_argument("--steps", type=int, default=10, help="steps of each run that are")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way, in turns")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--cfg-options", nargs="+", default=[], help="more settings of ours: compile=True")
    options = parser.parse_args(arguments)
    options.precision = options.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    if options.warm_up < 1:
        parser.error("--warm-up must be at least 1: a step is timed from the end of the one before")
    options.script = options.script and options.script.resolve()

    options.matrix_rate = matrix_rate(options.precision)
    print(
        f"{options.repeats} runs of {options.steps} steps each after {options.warm_up}, {options.workers} "
        f"workers, on {common.machine()}, {options.matrix_rate / 1e12:.3g} TFLOP/s in {options.precision}\n"
    )
    table = common.Table(
        "size", "px", "batch", "precision", "way", "s/step", "images/s", "times", "peak GB", "matrix rate"
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as root:
        for size in options.size:
            for resolution in options.resolution:
                model = common.make_model(Path(root) / f"{size}-{resolution}", size, resolution)
                for batch in options.batch:
                    cell = argparse.Namespace(
                        **{**vars(options), "size": size, "resolution": resolution, "batch": batch}
                    )
                    count = batch * (options.warm_up + options.steps)  # no epoch ends while it is timed
                    with tempfile.TemporaryDirectory(dir=root) as scratch:
                        data = common.write_images(Path(scratch) / "data", count)
                        compare(table, model, data, Path(scratch), cell)


if __name__ == "__main__":
    main()
