"""Images of what the model can do now."""

import json
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import final

import numpy as np
from PIL import Image

from diffengine import distributed
from diffengine.datasets import GOLDEN_RATIO, ImageDataset, UnreadableImage, center_crop
from diffengine.datasets.base import Size
from diffengine.engine.mmengine_seam import Hook
from diffengine.engine.run import Run
from diffengine.engine.step import Step
from diffengine.errors import require
from diffengine.files import write_text
from diffengine.grids import save_grid, save_image, save_webp, stack
from diffengine.models.base import LabelledImage, MaskedImageModel, PreviewRequest
from diffengine.models.frozen import evaluating, frozen_in, restored
from diffengine.models.generation import NotFinite


@final
class PreviewHook(Hook):
    """Generates previews before the first step, every `every` epochs or steps, and at the end.

    Writes `previews/NNNNNN.png` (the number of steps), shows it in the visualizer's backends, and ends with
    `before_after.png`. Each image is also written singly, as `previews/NNNNNN/KK.webp`, with its prompt in
    `previews/prompts.json`; for prompts from the data, `previews/original/KK.webp` is the image that has this caption,
    and `previews/round_trip/KK.webp` what the VQ model makes of it, the best that can be generated. Noise comes from
    separate generators, so training is bit-identical without previews.

    Args:
        prompts: captions to generate, none for no previews; or a number, to take that many distinct captions (with
            their images) from the data, spread over it.
        every: in the unit that the config counts; None for the beginning and the end only.
        resolution: side in pixels; None for the model's own.
        seed: image i uses seed + i.
        options: the model's generation options: for aMUSEd `guidance_scale`, `num_inference_steps`, `temperature`, and
            `strip=True` for the first prompt after every generation step.
    """

    def __init__(
        self,
        prompts: list[str] | int = 4,
        every: int | None = 1,
        resolution: int | None = None,
        seed: int = 0,
        options: dict | None = None,
    ) -> None:
        some = not isinstance(prompts, int) or prompts >= 1
        require(some, f"preview prompts got {prompts}; expected captions, or how many to take from the data")
        require(every is None or every >= 1, f"preview `every` got {every}; expected at least 1, or None")
        self.prompts, self.every = prompts, every
        self.resolution = resolution
        self.request = PreviewRequest([], [], seed, [], options or {})
        self._shown_at: int | None = None

    def before_train(self, run: Run) -> None:
        if run.clock.done == 0:
            self._show(run)
        self._plan(run)

    def after_step(self, run: Run, step: Step) -> None:
        if run.clock.due(self.every):
            self._show(run)
            self._plan(run)

    def after_train(self, run: Run) -> None:
        self._show(run)
        first, last = _path(run, 0), _path(run, run.clock.done)

        def compare() -> None:
            if first.exists() and last.exists():  # a run that was resumed in another folder has none
                with Image.open(first) as before, Image.open(last) as after:
                    grid = stack([("before", before), (f"after {run.clock.done} steps", after)])
                save_image(grid, run.work_dir / "before_after.png")

        distributed.on_rank_0(compare)

    def _plan(self, run: Run) -> None:
        run.next_preview = run.clock.next_due(self.every) if self.prompts else None

    def _show(self, run: Run) -> None:
        if self.prompts and self._shown_at != run.clock.done:
            self._shown_at = run.previewed_at = run.clock.done
            with run.not_training():
                distributed.on_rank_0(lambda: self._generate(run))

    def _generate(self, run: Run) -> None:
        stream, path = run.train_loop.stream, _path(run, run.clock.done)
        if not isinstance(self.prompts, int):
            self.request.prompts = list(self.prompts)
            self.request.sizes = self._squares()
        elif not self.request.prompts:
            samples = distinct(stream.dataset, self.prompts, stream.skip_unreadable)
            self.request.prompts = list(samples)
            shapes = stream.shapes and [stream.shapes[index] for index, _ in samples.values()]
            self.request.sizes = shapes or self._squares()
            self.request.images = [
                center_crop(image, size or min(image.size))
                for (_, image), size in zip(samples.values(), self.request.sizes or repeat(None))
                if image is not None
            ]
        try:
            with run.averaged_weights(), run.optim_wrapper.autocast():
                images = run.trainable.preview(self.request)
        except NotFinite as error:  # CheckpointHook decides whether to go on
            run.logger.info(f"no preview at step {run.clock.done}: {error}")
            return
        self._save_singly(run, images)
        grid = save_grid([(item.label, item.image) for item in images], path)
        run.visualizer.add_image("preview", np.asarray(grid), step=run.clock.done)
        run.logger.info(f"preview {path}")

    def _squares(self) -> list[Size]:
        """The size of each prompt's image; empty for the model's own."""
        return [(self.resolution, self.resolution)] * len(self.request.prompts) if self.resolution else []

    def _save_singly(self, run: Run, images: Sequence[LabelledImage]) -> None:
        """Write each image to its own file, and what they are to `prompts.json`."""
        folder, count = run.work_dir / "previews", len(self.request.prompts)
        for number, item in enumerate(images):
            save_webp(item.image, folder / f"{run.clock.done:06}" / f"{number:02}.webp")
        labels = [item.label for item in images]
        from_data = isinstance(self.prompts, int)
        known = {"prompts": labels[:count], "steps": labels[count:], "from_data": from_data}
        write_text(folder / "prompts.json", json.dumps(known, ensure_ascii=False))
        model, complete = run.trainable, len(self.request.images) == count
        if from_data and complete and isinstance(model, MaskedImageModel) and not (folder / "round_trip").exists():
            with restored(frozen_in(model)), evaluating(model):
                sampler = model.sampler()
                sizes = self.request.sizes or repeat((sampler.side, sampler.side))
                originals = [
                    image.resize(size, Image.Resampling.LANCZOS) for image, size in zip(self.request.images, sizes)
                ]
                round_trips = list(sampler.reconstruct(originals))
            for name, group in (("original", originals), ("round_trip", round_trips)):
                for number, image in enumerate(group):
                    save_webp(image, folder / name / f"{number:02}.webp")


def _path(run: Run, step: int) -> Path:
    return run.work_dir / "previews" / f"{step:06}.png"


def distinct(
    dataset: ImageDataset, count: int, skip_unreadable: bool = False
) -> dict[str, tuple[int, Image.Image | None]]:
    """Up to `count` distinct captions, spread over the data: each one's index and image (None: not on this machine).

    Spread by the golden ratio: equal steps would coincide with groups in the data.
    """
    found: dict[str, tuple[int, Image.Image | None]] = {}
    size = len(dataset)
    spread = [int(size * (index * GOLDEN_RATIO % 1)) for index in range(count)] if size >= count else []
    for index in dict.fromkeys([*spread, *range(min(size, 4 * count))]):
        if len(found) == count:
            break
        try:
            sample = dataset[index]
        except UnreadableImage:
            if not skip_unreadable:
                raise
            continue
        caption = sample["text"] if isinstance(sample["text"], str) else sample["text"][0]
        found.setdefault(caption, (index, sample.get("image")))
    return found
