"""Generate images from prompts: a labelled PNG grid, or a folder of PNGs."""

import argparse
import math
import os
import re
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffengine import config
from diffengine.errors import UserError, require
from diffengine.files import read_foreign
from diffengine.terminal import Progress, say
from diffengine.text import can_be_written

if TYPE_CHECKING:
    from PIL import Image

    from diffengine.models.generation import GenerationOptions, ImageRequest

    Results = dict[tuple[int, GenerationOptions], Image.Image]  # by number of the request

MOST_IMAGES = 100_000
LARGEST_FILE = 10**7  # bytes of prompts


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", help="a pipeline folder, a hub name, a run's work dir or checkpoint, or a folder that convert wrote")
    add("prompt", nargs="*", metavar="PROMPT")
    add("--prompts", metavar="FILE", help="a text file with a prompt per line")
    add("--base", help="the pipeline to put what convert wrote on; an adapter names its own")
    add("--n", type=int, default=1, help="images per prompt (default 1)")
    add("--seed", type=int, default=0, help="image i uses SEED + i (default 0)")
    add("--negative", default="", metavar="PROMPT", help="what guidance leads away from")
    add("--guidance", type=float, nargs="+", metavar="SCALE", help="guidance scales; default: what suits the model")
    add("--guidance-schedule", choices=("constant", "linear"), default="constant", help="linear: rising from 1")
    add("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"),
        help="guide only this share of the steps: 0 0.5 is the first half")  # fmt: skip
    add("--steps", type=int, nargs="+", default=[12], metavar="STEPS", help="generation steps (default 12)")
    add("--temperature", type=float, nargs=2, default=(2.0, 0.0), metavar=("FIRST", "LAST"),
        help="noise on the order of tokens at the first and the last step (default 2 0)")  # fmt: skip
    add("--order", choices=("confidence", "halton"), default="confidence", help="which tokens are kept first")
    add("--masking", choices=("cosine", "linear", "arccos"), help="share of masked tokens over the steps")
    add("--image", metavar="FILE", help="an image to start from")
    add("--strength", type=float, help="share of the steps taken from the image (default 0.5, or 1 with --mask)")
    add("--mask", metavar="FILE", help="white where the image is generated again, black where it is kept")
    add("--size", metavar="WxH", help="in pixels; default: that of the image, else the model's own")
    add("--resolution", type=int, help="side of a square image in pixels")
    add("--dtype", choices=("auto", "fp32", "fp16", "bf16"), default="auto",
        help="of the model; auto: bf16 on a GPU that has it, else fp32")  # fmt: skip
    add("--exact", action="store_true", help="on a GPU: take the noise from the CPU, for the same images as there")
    add("--compile", action="store_true", help="compile the model: faster for many images")
    add("-o", "--output", help="a PNG file for a grid (default sample.png), or a folder for a PNG per image")
    add("--overwrite", action="store_true", help="replace images that exist")


def run(options: argparse.Namespace) -> int:
    settings, requests = _settings(options), _requests(options)
    size, output = _size(options), _output(options)

    from diffengine.api import checkpoint_of, load_sampler
    from diffengine.engine.checkpoint import BEST
    from diffengine.grids import save_image

    folder, newest = Path(options.source), None if options.base else checkpoint_of(options.source)
    if newest is not None and folder.is_dir():
        best = folder / BEST
        other = f"; the one with the lowest validation loss: '{best}'" if best.exists() else ""
        say(f"generating with the newest checkpoint, '{newest}'{other}")
    sampler = load_sampler(options.source, options.base, options.dtype)
    for prompt in dict.fromkeys(request.prompt for request in requests):
        if rest := sampler.cut(prompt):
            say(f"the prompt '{prompt[:40]}...' is too long: the model does not read '{rest}'")
    if options.compile:
        sampler.compile()
    steps = sum(setting.num_inference_steps for setting in settings)
    results: Results = {}
    with Progress(len(requests) * len(settings), "generated", "images", steps / len(settings)) as progress:
        generated = [sampler.generate(requests, setting, size, on_step=progress.advance) for setting in settings]
        for setting, images in zip(settings, generated):
            for number, (request, image) in enumerate(zip(requests, images)):
                results[number, setting] = image
                if not output.suffix:
                    used = setting.or_guided_by(sampler.guidance_scale)
                    several = used if len(settings) > 1 else None
                    save_image(image, output / _name(number, request, several), _texts(options.source, request, used))
    if output.suffix:
        _write_grid(output, results, requests, settings, options)
    say(f"wrote {output}" if output.suffix else f"wrote {len(results)} images to {output}")
    return 0


def check_settings(options: argparse.Namespace) -> None:
    """Refuse values of --guidance, --steps, --n and --resolution that no model can generate with."""
    require(options.n >= 1, f"--n got {options.n}; expected at least 1")
    require(options.n <= MOST_IMAGES, f"--n got {options.n:,}; expected {MOST_IMAGES:,} at most")
    if options.resolution is not None:
        config.check_side("--resolution", options.resolution)
    for scale in options.guidance or []:
        fine = math.isfinite(scale) and scale >= 0
        require(fine, f"--guidance got {scale:g}; expected a number from 0; 1 is without guidance")
    for steps in options.steps:
        require(steps >= 1, f"--steps got {steps}; expected at least 1")


def read_prompts(file: str) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        text = read_foreign(Path(file), LARGEST_FILE).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts '{file}' is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    require(bool(prompts), f"--prompts '{file}' holds no prompt; expected one per line")
    longest = max(map(len, prompts))
    most = config.LONGEST_TEXT
    require(longest <= most, f"--prompts '{file}' has a prompt of {longest:,} characters; expected {most:,} at most")
    require(can_be_written("".join(prompts)), f"--prompts '{file}' has NUL characters; expected text")
    return prompts


def _settings(options: argparse.Namespace) -> list["GenerationOptions"]:
    """Every combination of guidance and steps."""
    check_settings(options)

    from diffengine.models.generation import GenerationOptions

    return [
        GenerationOptions(
            scale, steps, tuple(options.temperature), options.guidance_schedule, tuple(options.guidance_interval),
            options.masking, options.order, options.exact,
        )
        for scale, steps in product(options.guidance or [None], options.steps)
    ]  # fmt: skip


def _requests(options: argparse.Namespace) -> list["ImageRequest"]:
    """`--n` images for each prompt."""
    prompts = list(options.prompt)
    if options.prompts:
        prompts += read_prompts(options.prompts)
    require(bool(prompts), "got no prompt; give some after the source, or a file with --prompts")
    count = len(prompts) * options.n * len(options.steps) * len(options.guidance or [None])
    require(count <= MOST_IMAGES, f"got prompts and options for {count:,} images; expected {MOST_IMAGES:,} at most")
    last = options.seed + len(prompts) * options.n
    require(options.seed >= 0 and last < 2**63, f"--seed got {options.seed}; expected a whole number from 0")
    strength = options.strength
    require(strength is None or bool(options.image), "--strength got no --image to start from")
    require(strength is None or 0 < strength <= 1, f"--strength got {strength}; expected a number over 0, up to 1")
    require(not options.mask or bool(options.image), "--mask got no --image that it could keep some of")

    from diffengine.datasets.images import read_image
    from diffengine.models.generation import ImageRequest

    files = [options.image, options.mask]
    for file in files:
        require(file is None or Path(file).is_file(), f"no file '{file}'")
    image, mask = (file and read_image(file, f"'{file}'") for file in files)
    return [
        ImageRequest(prompt, options.seed + number * options.n + count, options.negative, image, mask, strength)
        for number, prompt in enumerate(prompts)
        for count in range(options.n)
    ]


def _output(options: argparse.Namespace) -> Path:
    """The PNG or folder to write. Without `-o` a new name: sample.png, sample-2.png and so on."""
    if options.output is None:
        names = ("sample.png", *(f"sample-{number}.png" for number in range(2, 10000)))
        return next(path for path in map(Path, names) if options.overwrite or not path.exists())
    path = Path(options.output)
    is_png = path.suffix.lower() == ".png" and not path.is_dir()
    is_folder = not path.suffix or path.is_dir()
    require(is_png or is_folder, f"--output got '{path}'; expected a file name that ends in .png, or a folder")
    kept = path.exists() and (is_png or any(path.glob("*.png"))) and not options.overwrite
    require(not kept, f"'{path}' {'exists' if is_png else 'holds images'}; give another --output, or --overwrite")
    folder = path.parent if is_png else path
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    fine = nearest.is_dir() and os.access(nearest, os.W_OK)
    require(fine, f"cannot write '{path}': '{nearest}' is no folder that can be written to")
    return path


def _size(options: argparse.Namespace) -> tuple[int, int] | None:
    require(not (options.size and options.resolution), "got both --size and --resolution; leave one out")
    if options.resolution is not None:
        return options.resolution, options.resolution
    if options.size is None:
        return None
    found = re.fullmatch(r"(\d{1,5})[xX×](\d{1,5})", options.size)
    if found is None:
        raise UserError(f"--size got '{options.size}'; expected WIDTHxHEIGHT, such as 512x768")
    size = int(found[1]), int(found[2])
    for side in size:
        config.check_side("--size", side)
    return size


def _write_grid(
    path: Path, results: "Results", requests: list["ImageRequest"], settings: list["GenerationOptions"],
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """One grid of all images or, with several settings, one of guidance x steps for each request."""
    from diffengine.grids import grid, save_grid, save_image, stack

    def name(request: "ImageRequest") -> str:
        return f"{request.prompt}, seed {request.seed}" if options.n > 1 else request.prompt

    if len(settings) == 1:
        save_grid([(name(request), results[number, settings[0]]) for number, request in enumerate(requests)], path)
        return
    sheets = []
    for number, request in enumerate(requests):
        cells = [(_label(setting), results[number, setting]) for setting in settings]
        sheets.append((name(request), grid(cells, columns=len(options.steps))))
    save_image(stack(sheets), path)


def _label(setting: "GenerationOptions") -> str:
    scale = "" if setting.guidance_scale is None else f"guidance {setting.guidance_scale:g}, "
    return f"{scale}{setting.num_inference_steps} steps"


def _name(number: int, request: "ImageRequest", setting: "GenerationOptions | None") -> str:
    """0001-a-cat-in-the-snow-seed7.png, with the settings if there are several."""
    words = "-".join(re.findall(r"\w+", request.prompt.lower()))[:48].strip("-")
    scale = f"-guidance{setting.guidance_scale:g}-steps{setting.num_inference_steps}" if setting else ""
    return f"{number + 1:04}-{words}-seed{request.seed}{scale}.png"


def _texts(source: str, request: "ImageRequest", setting: "GenerationOptions") -> dict[str, str]:
    """What an image was generated from, for the text chunks of its PNG."""
    texts: dict[str, Any] = {"prompt": request.prompt, "seed": request.seed, "source": source, **asdict(setting)}
    if request.negative_prompt:
        texts["negative_prompt"] = request.negative_prompt
    if request.image is not None:
        texts |= {"image": "yes", "mask": "no" if request.mask is None else "yes", "strength": request.strength}
    return {name: str(value) for name, value in texts.items()}
