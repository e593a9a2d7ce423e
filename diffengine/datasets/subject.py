"""A few images of a subject, and images of its class so that the class is not forgotten (DreamBooth)."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path

from diffengine.datasets.base import ImageDataset, Sample, Size
from diffengine.datasets.folder import is_image, list_files
from diffengine.datasets.image_text import ImageTextDataset
from diffengine.datasets.missing import MissingImages
from diffengine.errors import UserError, require
from diffengine.files import expanded, is_inside


@dataclass(eq=False)
class SubjectDataset(ImageDataset):
    """Images of one subject under `instance_prompt` and of its class under `class_prompt`, in turn.

    DreamBooth's prior preservation (arXiv 2208.12242): half of the samples are of the class, with the weight
    `prior_loss_weight` in the loss, sum_i w_i sum_j ce_ij / sum_i w_i n_i over samples i and their n_i masked tokens
    j. The shorter half repeats. Class images are listed when the first is read, so the run can generate them before.

    Args:
        data: the subject's images, anything that ImageTextDataset reads; its captions are ignored.
        instance_prompt, class_prompt: "a photo of sks dog", "a photo of a dog".
        class_data: a folder of class images, or None to train on the subject alone. If it holds fewer than
            `num_class_images`, the run generates the missing ones with the base model before training and records in
            `drawn.json` what generated them: they serve no other prompt and no other base.
        num_class_images: how many to use, the first by path, default 100.
        image_column, allow_outside: as of ImageTextDataset, for `data`.
        class_drawing: generation options, as of previews: `dict(guidance_scale=4.0)`.
        prior_loss_weight: above 0, default 1.

    Raises:
        UserError: class images without a prompt, numbers out of range, or one folder inside the other.
    """

    data: str
    instance_prompt: str
    _: KW_ONLY
    class_data: str | None = None
    class_prompt: str | None = None
    num_class_images: int = 100
    class_drawing: dict | None = None
    prior_loss_weight: float = 1.0
    image_column: str | None = None
    allow_outside: bool = False

    def __post_init__(self) -> None:
        data, folder, weight, count = self.data, self.class_data, self.prior_loss_weight, self.num_class_images
        got = f"SubjectDataset got class_data={folder!r} and class_prompt={self.class_prompt!r}"
        both_or_none = (folder is None) == (self.class_prompt is None)
        require(both_or_none, f"{got}; expected both, or neither to train without class images")
        require(count >= 1, f"num_class_images got {count}; expected at least 1, or class_data=None for none")
        require(weight > 0, f"prior_loss_weight got {weight}; expected a number above 0, or class_data=None for none")
        apart = folder is None or not (is_inside(data, folder) or is_inside(folder, data))
        message = f"class_data got '{folder}' and data '{data}', one inside the other; expected separate folders"
        require(apart, f"{message}, since each is read with its subfolders")
        self.subject = ImageTextDataset(
            data, caption=self.instance_prompt, image_column=self.image_column, allow_outside=self.allow_outside
        )

    @cached_property
    def class_images(self) -> ImageTextDataset:
        """The class images in use, `num_class_images` of them."""
        missing, count = self.missing_images(), self.num_class_images
        assert missing is not None
        lack = f"{self.class_data} lacks {len(missing.numbers)} of {count} class images"
        require(not missing.numbers, f"{lack}; use a model that generates them, add them, or lower num_class_images")
        return ImageTextDataset(str(missing.folder), caption=self.class_prompt, max_samples=count)

    def missing_images(self) -> MissingImages | None:
        """The class images to generate, numbered by the first free numbers; None without a class."""
        if self.class_data is None or self.class_prompt is None:
            return None
        folder = expanded(self.class_data)
        message = f"class_data got '{folder}', which is not a folder; expected a folder of class images"
        require(folder.is_dir() or not folder.exists(), message)
        files = list_files(folder) if folder.is_dir() else []
        missing = self.num_class_images - sum(map(is_image, files))
        taken = {file.name for file in files if file.parent == folder}
        free = (number for number in range(10**6) if f"{number:06}.png" not in taken)
        numbers = [number for number, _ in zip(free, range(missing))]
        return MissingImages(folder, self.class_prompt, numbers, dict(self.class_drawing or {}))

    def __len__(self) -> int:
        return len(self.subject) if self.class_data is None else 2 * max(len(self.subject), self.num_class_images)

    def __getitem__(self, index: int) -> Sample:
        dataset, inner = self._locate(index)
        return {**dataset[inner], "weight": 1.0 if dataset is self.subject else self.prior_loss_weight}

    def content(self, index: int) -> None:
        """Nothing: images of a subject are all trained."""

    def captions(self, index: int) -> list[str]:
        of_class = self.class_data is not None and index % 2 == 1
        return [self.class_prompt or ""] if of_class else self.subject.captions(0)

    def all_captions(self) -> Iterator[list[str]]:
        """Of the subject's images and then of the class's, once each."""
        yield from self.subject.all_captions()
        if self.class_prompt is not None:
            yield from [[self.class_prompt]] * self.num_class_images

    def source(self, index: int) -> tuple[bytes | str, str] | None:
        """None for a class image that is still to be generated."""
        try:
            dataset, inner = self._locate(index)
        except UserError:
            return None
        return dataset.source(inner)

    def name(self, index: int) -> str:
        dataset, inner = self._locate(index)
        return dataset.name(inner)

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
