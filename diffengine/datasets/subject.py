"""A few images of a subject, and images of its class so that the class is not forgotten (DreamBooth)."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from diffengine.datasets.base import ImageDataset, Sample, Size
from diffengine.datasets.folder import is_image, list_files
from diffengine.datasets.image_text import ImageTextDataset
from diffengine.datasets.missing import MissingImages
from diffengine.errors import UserError
from diffengine.files import is_inside


class SubjectDataset(ImageDataset):
    """Images of one subject under `instance_prompt` and of its class under `class_prompt`, in turn.

    DreamBooth's prior preservation (arXiv 2208.12242): half of the samples are of the class, with the weight
    `prior_loss_weight` in the loss, sum_i w_i sum_j ce_ij / sum_i w_i n_i over samples i and their n_i masked tokens
    j. The shorter half repeats. Class images are listed when the first of them is read, so the run can generate them
    before.

    Args:
        data: the subject's images, anything that ImageTextDataset reads; its captions are ignored.
        instance_prompt: "a photo of sks dog".
        class_data: a folder of class images, or None to train on the subject alone. If it holds fewer than
            `num_class_images`, the run generates the missing ones with the base model before training and records in
            `drawn.json` what generated them: they serve no other prompt and no other base.
        class_prompt: "a photo of a dog".
        num_class_images: how many to use, the first by path. Default 100.
        class_drawing: generation options, as of previews: `dict(guidance_scale=4.0)`.
        prior_loss_weight: above 0. Default 1.0.

    Raises:
        UserError: class images without a prompt, numbers out of range, or one folder inside the other.
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
                f"SubjectDataset got class_data={class_data!r} and class_prompt={class_prompt!r}; expected both, or "
                "neither to train without class images"
            )
        if num_class_images < 1:
            raise UserError(
                f"num_class_images got {num_class_images}; expected at least 1, or class_data=None for none"
            )
        if prior_loss_weight <= 0:
            raise UserError(
                f"prior_loss_weight got {prior_loss_weight}; expected a number above 0, or class_data=None to train "
                "without class images"
            )
        if class_data is not None and (is_inside(data, class_data) or is_inside(class_data, data)):
            raise UserError(
                f"class_data got '{class_data}' and data '{data}', one inside the other; expected separate folders, "
                "since each is read with its subfolders"
            )
        self.subject = ImageTextDataset(data, caption=instance_prompt)
        self.class_data = class_data
        self.class_prompt = class_prompt
        self.num_class_images = num_class_images
        self.class_drawing: Mapping[str, Any] = class_drawing or {}
        self.prior_loss_weight = prior_loss_weight

    @cached_property
    def class_images(self) -> ImageTextDataset:
        """The class images in use, `num_class_images` of them."""
        missing = self.missing_images()
        if missing and missing.numbers:
            raise UserError(
                f"{self.class_data} lacks {len(missing.numbers)} of {self.num_class_images} class images; train with a "
                "model that generates them, add them, or lower num_class_images"
            )
        assert self.class_data is not None
        return ImageTextDataset(self.class_data, caption=self.class_prompt, max_samples=self.num_class_images)

    def missing_images(self) -> MissingImages | None:
        """The class images to generate, numbered by the first free numbers; None without a class."""
        if self.class_data is None or self.class_prompt is None:
            return None
        folder = Path(self.class_data).expanduser()
        if folder.exists() and not folder.is_dir():
            raise UserError(f"class_data got '{folder}', which is not a folder; expected a folder of class images")
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
        dataset, inner = self._locate(index)
        weight = self.prior_loss_weight if dataset is not self.subject else 1.0
        return {**dataset[inner], "weight": weight}

    def captions(self, index: int) -> list[str]:
        of_class = self.class_data is not None and index % 2 == 1
        return [self.class_prompt or ""] if of_class else self.subject.captions(0)

    def all_captions(self) -> Iterator[list[str]]:
        """Of the subject's images and then of the class's, once each."""
        yield from self.subject.all_captions()
        if self.class_prompt is not None:
            yield from [[self.class_prompt]] * self.num_class_images

    def size(self, index: int) -> Size:
        dataset, inner = self._locate(index)
        return dataset.size(inner)

    def files(self) -> list[Path]:
        """Of the subject and then of the class."""
        return self.subject.files() + (self.class_images.files() if self.class_data is not None else [])

    def _locate(self, index: int) -> tuple[ImageTextDataset, int]:
        """(data set, index into it): even indices are the subject's."""
        if self.class_data is None:
            return self.subject, index
        half, of_class = divmod(index, 2)
        dataset = self.class_images if of_class else self.subject
        return dataset, half % len(dataset)
