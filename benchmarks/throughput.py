"""Images per second and peak memory, compared with the reference script of diffusers.

    python -m benchmarks.throughput PATH/train_amused.py --size full --resolution 512 --batch 1
    python -m benchmarks.throughput PATH/train_amused.py --size full --precision fp32 bf16   # on a CPU that has bf16
    python -m benchmarks.throughput --size tiny mid --batch 1 8   # without the reference

Both train the full transformer on the same images, from the same weights, with the same batch size, precision, clipping
and number of workers. Each is started by its own command line, and the runs take turns. A step is timed from the end of
the previous optimizer step to the end of this one.

With several precisions, speedups are over the reference in the first of them. The last column is the FLOP/s of the
transformer's forward and backward, divided by the FLOP/s of a large matrix product on this device in that precision,
which is measured at the start.
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
MODES = ("reference", "online", "cached")


def flops_per_image(size: str, resolution: int) -> float:
    """FLOPs of the transformer, forward and backward, for one image."""
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


def matmul_flops(precision: str) -> float:
    """FLOP/s of a large matrix product, the best of ten."""
    gpu = torch.cuda.is_available()
    side = 8192 if gpu else 1024
    torch.backends.cuda.matmul.allow_tf32 = True  # both sides may use TF32
    a = torch.ones(side, side, dtype=PRECISIONS[precision], device=common.DEVICE)
    seconds = []
    for _ in range(11):
        started = time.perf_counter()
        a @ a
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds[1:])


def reference(
    script: Path, model: Path, data: Path, out: Path, precision: str, options: argparse.Namespace
) -> list[str]:
    """The command line of the reference, with the settings of `ours`.

    The reference has no horizontal flips, and it crashes with caption dropout. So neither side uses them. It loads the
    same images through `datasets`. Its tracker is one that is not installed, so it logs nowhere: the TensorBoard
    tracker crashes on the script's options.
    """
    return [
        str(script), "--pretrained_model_name_or_path", str(model), "--instance_data_dataset", str(data),
        "--image_key", "image", "--prompt_key", "text", "--output_dir", str(out),
        "--resolution", str(options.resolution), "--train_batch_size", str(options.batch),
        "--mixed_precision", {"fp32": "no"}.get(precision, precision), "--allow_tf32",
        "--learning_rate", "1e-4", "--lr_scheduler", "constant", "--adam_weight_decay", "1e-2",
        "--max_grad_norm", "1.0", "--dataloader_num_workers", str(options.workers), "--seed", "0",
        "--max_train_steps", "1000", "--logging_steps", "1000", "--checkpointing_steps", "1000",
        "--validation_steps", "1000", "--report_to", "dvclive",
    ]  # fmt: skip


def ours(mode: str, cache: Path, precision: str, options: argparse.Namespace) -> list[str]:
    """Our settings: the recipe without what the reference cannot do. The timer stops the run before `max_iters`."""
    return [
        "--cfg-options", *common.STEPS_ONLY, f"batch_size={options.batch}", "learning_rate=1e-4",
        "caption_dropout=0.0", f"precision={precision}", f"num_workers={options.workers}",
        "max_iters=1000", "log_every=1000", *common.token_options(mode, cache),
        *options.cfg_options,
    ]  # fmt: skip


def measure(
    mode: str, precision: str, model: Path, data: Path, scratch: Path, options: argparse.Namespace
) -> Timings | str:
    """Time one run. The token cache is built before the first run that needs it, outside the timing."""
    steps = options.warm_up + options.steps
    if mode == "reference":
        command = reference(options.script, model, data, scratch / mode, precision, options)
        return common.run_timed(command, steps, options.python, HF_DATASETS_CACHE=str(scratch / "datasets"))
    config, cache = f"amused_{options.resolution}_own", scratch / f"cache_{precision}"
    settings = ours(mode, cache, precision, options)
    if mode == "cached" and not cache.exists():
        build = common.diffengine_command("cache", config, model, data, scratch / mode, *settings)
        if problem := common.run_python(*build):
            return problem
    train = common.diffengine_command("train", config, model, data, scratch / mode, "--overwrite", *settings)
    return common.run_timed(train, steps)


def compare(table: common.Table, model: Path, data: Path, scratch: Path, options: argparse.Namespace) -> None:
    """Print the table rows for one size, resolution and batch size."""
    modes = [mode for mode in options.modes if mode != "reference" or options.script]
    rows = [(precision, mode) for precision in options.precision for mode in modes]
    runs: dict[tuple[str, str], list[Timings | str]] = {row: [] for row in rows}
    for _ in range(options.repeats):
        for precision, mode in rows:
            runs[precision, mode].append(measure(mode, precision, model, data, scratch, options))
    baseline = None
    for precision, mode in rows:
        problems = [run for run in runs[precision, mode] if isinstance(run, str)]
        timings = [run for run in runs[precision, mode] if isinstance(run, Timings)]
        cell = (options.size, options.resolution, options.batch, precision, mode)
        if problems:
            table.row(*cell, problems[0].replace("|", "/"), *[""] * 4)
            continue
        if any(run.torch != torch.__version__ for run in timings):
            raise SystemExit(f"the reference ran with torch {timings[0].torch}; expected {torch.__version__}")
        seconds = [value for run in timings for value in run.seconds[options.warm_up - 1 :]]
        per_second = options.batch / statistics.median(seconds)
        baseline = baseline or (per_second if mode == "reference" else None)
        speedup = f"{per_second / baseline:.2f}" if baseline else ""
        memory = max(run.memory_gb for run in timings)
        utilization = per_second * flops_per_image(options.size, options.resolution) / options.matmul_flops[precision]
        table.row(*cell, common.spread(seconds), f"{per_second:.3g}", speedup, f"{memory:.2f}", f"{utilization:.1%}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("script", nargs="?", type=Path, help="path of the reference's train_amused.py")
    parser.add_argument("--python", default=sys.executable, help="interpreter for the script; it needs torchvision")
    parser.add_argument("--size", nargs="+", choices=common.SIZES, default=["tiny"])
    parser.add_argument("--resolution", nargs="+", type=int, choices=(256, 512), default=[512])
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="images per step")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--precision", nargs="+", choices=list(PRECISIONS), help="default: bf16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument("--warm-up", type=int, default=3, help="untimed steps at the start of each run")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each run")
    parser.add_argument("--repeats", type=int, default=3, help="runs per mode, in turns")
    parser.add_argument("--workers", type=int, default=2, help="data loader workers")
    parser.add_argument("--cfg-options", nargs="+", default=[], help="our config options, for example compile=True")
    options = parser.parse_args(arguments)
    options.precision = options.precision or ["bf16" if torch.cuda.is_available() else "fp32"]
    if options.warm_up < 1:
        parser.error("--warm-up must be at least 1: a step is timed from the end of the previous one")
    options.script = options.script and options.script.resolve()

    options.matmul_flops = {precision: matmul_flops(precision) for precision in options.precision}
    peaks = ", ".join(f"{flops / 1e12:.3g} TFLOP/s in {name}" for name, flops in options.matmul_flops.items())
    print(
        f"{options.repeats} runs of {options.steps} steps each after {options.warm_up}, {options.workers} "
        f"workers, on {common.machine()}, {peaks}\n"
    )
    table = common.Table(
        "size", "px", "batch", "precision", "mode", "s/step", "images/s", "speedup", "peak GB",
        "matmul utilization",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as root:
        for size in options.size:
            for resolution in options.resolution:
                model = common.make_model(Path(root) / f"{size}-{resolution}", size, resolution)
                for batch in options.batch:
                    cell = argparse.Namespace(
                        **{**vars(options), "size": size, "resolution": resolution, "batch": batch}
                    )
                    count = batch * (options.warm_up + options.steps)  # so that no epoch ends during the timing
                    with tempfile.TemporaryDirectory(dir=root) as scratch:
                        data = common.write_images(Path(scratch) / "data", count)
                        compare(table, model, data, Path(scratch), cell)


if __name__ == "__main__":
    main()
