"""Images of what the model can do now."""

from pathlib import Path
from typing import Any, final

import numpy as np
from mmengine.hooks import Hook
from PIL import Image

from diffengine import distributed
from diffengine.datasets import Crop, Resize, UnreadableImage, generator
from diffengine.engine.hooks.ema import averaged_weights
from diffengine.errors import UserError
from diffengine.grids import save_grid, stack
from diffengine.models.base import NotFinite, PreviewRequest


@final
class PreviewHook(Hook):
    """Draws previews before the first step, every `every` epochs or steps, and at the end.

    Writes `previews/NNNNNN.png` (the number of steps), shows them in the visualizer's backends, and ends with
    `before_after.png`. Noise comes from generators of the previews' own, so training is bit-identical without
    them.

    Args:
        prompts: captions to draw, none for no previews; or a number, to take that many distinct captions
            (with their images) from the data, spread over it.
        every: in the unit the config counts; None for the beginning and the end only.
        resolution: side in pixels; None for the model's own.
        seed: image i draws from seed + i.
        options: the model's drawing options: for aMUSEd `guidance_scale`, `num_inference_steps`,
            `temperature`, and `strip=True` for the first prompt after every drawing step.
    """

    def __init__(
        self,
        prompts: list[str] | int = 4,
        every: int | None = 1,
        resolution: int | None = None,
        seed: int = 0,
        options: dict | None = None,
    ) -> None:
        if isinstance(prompts, int) and prompts < 1:
            raise UserError(f"preview prompts got {prompts}; expected captions, or how many to take from the data")
        if every is not None and every < 1:
            raise UserError(f"preview `every` got {every}; expected at least 1, or None")
        self.prompts = prompts
        self.every = every
        self.request = PreviewRequest([], [], seed, resolution, options or {})
        self._drawn_at: int | None = None

    def before_train(self, runner: Any) -> None:
        if runner.train_loop.done == 0:
            self._draw(runner)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.train_loop.due(self.every):
            self._draw(runner)

    def after_train(self, runner: Any) -> None:
        self._draw(runner)
        distributed.on_rank_0(lambda: self._before_after(runner))

    def _draw(self, runner: Any) -> None:
        if self.prompts and self._drawn_at != runner.train_loop.done:
            self._drawn_at = runner.train_loop.done
            distributed.on_rank_0(lambda: self._draw_grid(runner))

    def _draw_grid(self, runner: Any) -> None:
        if not self.request.prompts:
            self._choose(runner.train_loop.stream)
        try:
            with averaged_weights(runner), runner.optim_wrapper.autocast():
                images = runner.trainable.preview(self.request)
        except NotFinite as error:  # whether to go on is a checkpoint's affair
            runner.logger.info(f"no preview at step {runner.train_loop.done}: {error}")
            return
        path = self._path(runner, runner.train_loop.done)
        grid = save_grid([(image.label, image.image) for image in images], path)
        runner.visualizer.add_image("preview", np.asarray(grid), step=runner.train_loop.done)
        runner.logger.info(f"drew {path}")

    def _choose(self, stream: Any) -> None:
        """Fill in the request: captions as given, or of the data with their images."""
        if not isinstance(self.prompts, int):
            self.request.prompts = list(self.prompts)
            return
        samples = distinct(stream.dataset, self.prompts, stream.skip_unreadable)
        self.request.prompts = [caption for caption, _ in samples]
        self.request.images = [self._square(image) for _, image in samples if image is not None]

    def _before_after(self, runner: Any) -> None:
        first, last = self._path(runner, 0), self._path(runner, runner.train_loop.done)
        if first.exists() and last.exists():  # a run that was resumed in another folder has none
            with Image.open(first) as before, Image.open(last) as after:
                grid = stack([("before", before), (f"after {runner.train_loop.done} steps", after)])
            grid.save(Path(runner.work_dir) / "before_after.png")

    def _path(self, runner: Any, step: int) -> Path:
        return Path(runner.work_dir) / "previews" / f"{step:06}.png"

    def _square(self, image: Image.Image) -> Image.Image:
        """The centre of an image, as training sees it."""
        size = self.request.resolution or min(image.size)
        sample: dict[str, Any] = {"image": image, "text": ""}
        rng = generator(0, 0, 0)
        return Crop(size, random=False)(Resize(size)(sample, rng), rng)["image"]


def distinct(dataset: Any, count: int, skip_unreadable: bool = False) -> list[tuple[str, Image.Image | None]]:
    """Up to `count` distinct captions, spread over the data, each with its image, None if that is not here.

    By the golden ratio, since equal steps would fall in with data that is itself in groups.

    Raises:
        UnreadableImage: unless those are to be skipped.
    """
    found: dict[str, Image.Image | None] = {}
    size = len(dataset)
    indices = [int(size * (index * 0.6180339887498949 % 1)) for index in range(count)] if size >= count else []
    for index in dict.fromkeys([*indices, *range(min(size, 4 * count))]):
        if len(found) == count:
            break
        try:
            sample = dataset[index]
        except UnreadableImage:
            if not skip_unreadable:
                raise
            continue
        caption = sample["text"] if isinstance(sample["text"], str) else sample["text"][0]
        found.setdefault(caption, sample.get("image"))
    return list(found.items())
