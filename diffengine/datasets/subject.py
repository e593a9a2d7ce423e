"""A subject's few images, beside images of its class, so that the class is not forgotten (DreamBooth)."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from diffengine.datasets.folder import is_image, list_files
from diffengine.datasets.image_text import ImageTextDataset
from diffengine.datasets.images import Sample
from diffengine.errors import UserError
from diffengine.files import is_inside, write_text

RECORD = "drawn.json"  # beside class images: those that a run drew, and what it drew them from


@dataclass
class MissingImages:
    """Images that a data set waits for: the run draws them with the model, before it trains.

    Attributes:
        folder: where they go; it need not exist.
        prompt: what to draw.
        numbers: one an image: the seed of its noise, and its file `NNNNNN.png`, which is not there yet.
        options: the model's own drawing options, by name.
    """

    folder: Path
    prompt: str
    numbers: list[int]
    options: dict[str, Any] = field(default_factory=dict)

    def claim(self, base: str) -> None:
        """Note in the folder's `drawn.json` that its missing images are drawn by the model `base`.

        Images that are not listed there are somebody's own, and taken as they are.

        Raises:
            UserError: images are there that were drawn by another prompt, base or options; or the folder
                cannot be written.
        """
        record = self.folder / RECORD
        now = {"prompt": self.prompt, "base": base, "options": self.options}
        try:
            before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
            drawn = [name for name in before.get("pictures", []) if (self.folder / name).exists()]
            changed = [f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in now
                       if before.get(key) != now[key]]  # fmt: skip
            if drawn and changed:
                raise UserError(
                    f"'{self.folder}' holds {len(drawn)} class images that were drawn otherwise: "
                    f"{'; '.join(changed)}; choose another class_data, delete them to have them drawn anew, "
                    f"or delete {RECORD} to keep them"
                )
            if self.numbers:
                self.folder.mkdir(parents=True, exist_ok=True)
                names = [*drawn, *(f"{number:06}.png" for number in self.numbers)]
                write_text(record, json.dumps({**now, "pictures": names}, indent=1))
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"cannot keep class images in '{self.folder}': {error}") from error


class SubjectDataset:
    """Images of one subject under `instance_prompt` and of its class under `class_prompt`, in turn.

    DreamBooth's prior preservation (arXiv 2208.12242): half of the samples are of the class, with the weight
    `prior_loss_weight` in the loss, sum_i w_i sum_j ce_ij / sum_i w_i n_i over samples i and their n_i masked
    tokens j. The shorter half repeats.

    data: the subject's images, anything ImageTextDataset reads; their captions are not.
    instance_prompt: "a photo of sks dog".
    class_data: a folder of class images, or None to train on the subject alone. Where it holds fewer than
        `num_class_images`, the run draws the missing ones with the base model before training, and notes in
        its `drawn.json` what they were drawn by: they serve no other prompt and no other base.
    class_prompt: "a photo of a dog". num_class_images: how many to use, default 100: the first by path.
    class_drawing: options of that drawing, as of previews: `dict(guidance_scale=4.0)`.
    prior_loss_weight: above 0, default 1.0.

    Class images are looked at when the first of them is read, so that they may be drawn before.
    Raises UserError for class images without a prompt, for numbers that make no sense, and for folders one
    inside the other.
    """

    def __init__(
        self,
        data: str,
        instance_prompt: str,
        *,
        class_data: str | None = None,
        class_prompt: str | None = None,
        num_class_images: int = 100,
        class_drawing: dict | None = None,
        prior_loss_weight: float = 1.0,
    ) -> None:
        if (class_data is None) != (class_prompt is None):
            raise UserError(
                f"SubjectDataset got class_data={class_data!r} and class_prompt={class_prompt!r}; expected "
                "both, or neither to train without class images"
            )
        if num_class_images < 1:
            raise UserError(
                f"num_class_images got {num_class_images}; expected at least 1, or class_data=None for none"
            )
        if prior_loss_weight <= 0:
            raise UserError(
                f"prior_loss_weight got {prior_loss_weight}; expected a number above 0, or class_data=None "
                "to train without class images"
            )
        if class_data is not None and (is_inside(data, class_data) or is_inside(class_data, data)):
            raise UserError(
                f"class_data got '{class_data}' and data '{data}', one inside the other; expected folders "
                "apart, since each is read with its subfolders"
            )
        self.subject = ImageTextDataset(data, caption=instance_prompt)
        self.class_data = class_data
        self.class_prompt = class_prompt
        self.num_class_images = num_class_images
        self.class_drawing: Mapping[str, Any] = class_drawing or {}
        self.prior_loss_weight = prior_loss_weight

    @cached_property
    def of_class(self) -> ImageTextDataset:
        """The class images in use, `num_class_images` of them."""
        missing = self.missing_images()
        if missing and missing.numbers:
            raise UserError(
                f"{self.class_data} lacks {len(missing.numbers)} of {self.num_class_images} class images; "
                "train with a model that draws them, add them, or lower num_class_images"
            )
        assert self.class_data is not None
        return ImageTextDataset(self.class_data, caption=self.class_prompt, max_samples=self.num_class_images)

    def missing_images(self) -> MissingImages | None:
        """The class images to draw, perhaps none, by the first free numbers; None without a class."""
        if self.class_data is None or self.class_prompt is None:
            return None
        folder = Path(self.class_data).expanduser()
        if folder.exists() and not folder.is_dir():
            raise UserError(f"class_data got '{folder}', which is no folder; expected one of class images")
        files = list_files(folder) if folder.is_dir() else []
        missing = self.num_class_images - sum(map(is_image, files))
        taken = {file.name for file in files if file.parent == folder}
        free = (number for number in range(10**6) if f"{number:06}.png" not in taken)
        numbers = [number for number, _ in zip(free, range(missing))]
        return MissingImages(folder, self.class_prompt, numbers, dict(self.class_drawing))

    def __len__(self) -> int:
        if self.class_data is None:
            return len(self.subject)
        return 2 * max(len(self.subject), self.num_class_images)

    def __getitem__(self, index: int) -> Sample:
        dataset, place = self._locate(index)
        weight = self.prior_loss_weight if dataset is not self.subject else 1.0
        return {**dataset[place], "weight": weight}

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels, upright, from the header alone."""
        dataset, place = self._locate(index)
        return dataset.size(place)

    def files(self) -> list[Path]:
        """The files that hold the images' bytes, of the subject and then of the class."""
        return self.subject.files() + (self.of_class.files() if self.class_data is not None else [])

    def captions(self) -> Iterator[str]:
        """Every caption, of the subject and then of the class; no image is read."""
        yield from self.subject.captions()
        if self.class_prompt is not None:
            yield from [self.class_prompt] * self.num_class_images

    def _locate(self, index: int) -> tuple[ImageTextDataset, int]:
        """(data set, place in it): even indices are the subject's."""
        if self.class_data is None:
            return self.subject, index
        half, of_class = divmod(index, 2)
        dataset = self.of_class if of_class else self.subject
        return dataset, half % len(dataset)
