"""Generating the images that a data set lacks, with the model before it is trained."""

from collections.abc import Sequence
from functools import partial

from diffengine import distributed
from diffengine.datasets import ImageDataset, MissingImages
from diffengine.engine.optim import StepOptimWrapper
from diffengine.errors import UserError
from diffengine.grids import save_image
from diffengine.models.base import MaskedImageModel, PreviewRequest, TrainableModel
from diffengine.terminal import say

BATCH = 8  # images generated at once


def generate_missing(dataset: ImageDataset, model: TrainableModel, optim: StepOptimWrapper) -> None:
    """Generate a data set's missing images. Rank 0 writes each atomically, so a killed run continues with the next."""

    def claim() -> list[MissingImages]:
        claimed = [missing for missing in dataset.missing_images() if check_can_generate(missing, model)]
        for missing in claimed:
            missing.claim(model.origin)
            if missing.numbers:
                say(f"{_lack(missing)}: generating '{missing.prompt}' before training")
        return claimed

    for missing in distributed.on_rank_0(claim):
        for numbers in _runs(missing.numbers):  # so no rank waits longer than one batch takes
            distributed.on_rank_0(partial(_generate, missing, numbers, model, optim))


def check_can_generate(missing: MissingImages, model: TrainableModel) -> bool:
    """Whether the model generates images from text. If it does not and images are missing, it is refused."""
    able = isinstance(model, MaskedImageModel) and not model.assets
    if missing.numbers and not able:
        why = "is built from scratch" if model.assets else "generates nothing from text"
        cannot = f"the model, which {why}, cannot generate them"
        raise UserError(f"{_lack(missing)}, and {cannot}; add them, or start from a trained model")
    return able


def _lack(missing: MissingImages) -> str:
    return f"'{missing.folder}' lacks {len(missing.numbers)} class images"


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Numbers that follow one another, in batches."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1 and len(runs[-1]) < BATCH:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _generate(missing: MissingImages, numbers: list[int], model: TrainableModel, optim: StepOptimWrapper) -> None:
    """Write `NNNNNN.png` for each number, which is its seed too, unless it has appeared meanwhile."""
    prompts = [missing.prompt] * len(numbers)
    with optim.autocast():
        images = model.preview(PreviewRequest(prompts, seed=numbers[0], options=missing.options))
    for number, image in zip(numbers, images):
        path = missing.folder / f"{number:06}.png"
        try:
            if not path.exists():
                save_image(image.image, path)
        except OSError as error:
            raise UserError(f"cannot write class image '{path}': {error}") from error
    done = missing.numbers.index(numbers[-1]) + 1
    say(f"generated {done}/{len(missing.numbers)} class images")
