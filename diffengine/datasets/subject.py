"""A subject's few pictures, beside pictures of its class, so that the class is not forgotten (DreamBooth)."""

from collections.abc import Iterator
from typing import Any

from diffengine.datasets.image_text import ImageTextDataset
from diffengine.datasets.pictures import Sample
from diffengine.errors import UserError


class SubjectDataset:
    """Pictures of one subject under `instance_prompt` and of its class under `class_prompt`, in turn.

    DreamBooth's prior preservation (arXiv 2208.12242): half of the samples are of the class, with the weight
    `prior_loss_weight` in the loss, sum_i w_i sum_j ce_ij / sum_i w_i n_i over samples i and their n_i masked
    tokens j. The shorter half repeats.

    data: the subject's pictures, anything ImageTextDataset reads; their captions are not.
    instance_prompt: "a photo of sks dog".
    class_data: a folder of class pictures, or None to train on the subject alone. Where it holds fewer than
        `num_class_images`, the run draws the missing ones with the base model before training.
    class_prompt: "a photo of a dog". num_class_images: how many to use, default 100.
    prior_loss_weight: default 1.0.

    Raises UserError for class pictures without a prompt, and for a negative weight.
    """

    def __init__(
        self,
        data: str,
        instance_prompt: str,
        *,
        class_data: str | None = None,
        class_prompt: str | None = None,
        num_class_images: int = 100,
        prior_loss_weight: float = 1.0,
    ) -> None:
        if (class_data is None) != (class_prompt is None):
            raise UserError(
                f"SubjectDataset got class_data={class_data!r} and class_prompt={class_prompt!r}; expected "
                "both, or neither to train without class pictures"
            )
        if prior_loss_weight < 0:
            raise UserError(f"prior_loss_weight got {prior_loss_weight}; expected 0 or more")
        self.subject: Any = ImageTextDataset(data, caption=instance_prompt)
        self.of_class: Any = None
        if class_data is not None:
            self.of_class = ImageTextDataset(class_data, caption=class_prompt, max_samples=num_class_images)
        self.prior_loss_weight = prior_loss_weight

    def __len__(self) -> int:
        if self.of_class is None:
            return len(self.subject)
        return 2 * max(len(self.subject), len(self.of_class))

    def __getitem__(self, index: int) -> Sample:
        dataset, place = self._locate(index)
        weight = 1.0 if dataset is self.subject else self.prior_loss_weight
        return {**dataset[place], "weight": weight}

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels, upright, from the header alone."""
        dataset, place = self._locate(index)
        return dataset.size(place)

    def captions(self) -> Iterator[str]:
        """Every caption, of the subject and then of the class."""
        yield from self.subject.captions()
        if self.of_class is not None:
            yield from self.of_class.captions()

    def _locate(self, index: int) -> tuple[Any, int]:
        """(data set, place in it): even indices are the subject's."""
        if self.of_class is None:
            return self.subject, index
        half, of_class = divmod(index, 2)
        dataset = self.of_class if of_class else self.subject
        return dataset, half % len(dataset)
