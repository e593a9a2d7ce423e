"""What happens to a sample between the data set and the batch.

A transform takes a sample and a generator and returns the changed sample. It draws the same number of random values
whatever its options are, so changing one probability does not shift the draws after it. To add one, subclass
`Transform` and name it in a config.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from diffengine.config import check_side
from diffengine.datasets.base import Sample, Size
from diffengine.errors import require

MAX_RATIO = 64  # of the long to the short side of an image that is resized


class Transform(ABC):
    """One change of a sample. Any callable of (sample, generator) serves as well."""

    @abstractmethod
    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The changed sample."""

    def effect(self, size: Size | None) -> tuple[Size | None, bool]:
        """(the size afterwards, whether the result depends on a random draw) for an image of this size (None: any)."""
        return None, True

    def for_shape(self, shape: Size) -> "Transform":
        """The transform that makes images of this (width, height); itself if it changes no size."""
        return self

    def mirroring(self, p: float) -> "Transform":
        """This transform for images that are mirrored with probability `p`."""
        return self


AnyTransform = Transform | Callable[[Sample, np.random.Generator], Sample]


def effect_of(transforms: Sequence[AnyTransform], size: Size | None) -> tuple[Size | None, bool]:
    """`Transform.effect` of all transforms in turn."""
    any_random = False
    for transform in transforms:
        size, random = transform.effect(size) if isinstance(transform, Transform) else (None, True)
        any_random |= random
    return size, any_random


def mirroring(transforms: Sequence[AnyTransform], p: float) -> list[AnyTransform]:
    """The transforms for images that are mirrored with probability `p`; a UserError if none of them mirrors."""
    found = [item.mirroring(p) if isinstance(item, Transform) else item for item in transforms]
    message = f"a source got mirror={p}, but no image transform mirrors; put Flip among them"
    require(any(new is not old for new, old in zip(found, transforms)), message)
    return found


def apply(transforms: Sequence[AnyTransform], sample: Sample, rng: np.random.Generator) -> Sample:
    """The sample after all transforms in turn."""
    for transform in transforms:
        sample = transform(sample, rng)
    return sample


def _change(sample: Sample, change: Callable[[Image.Image], Image.Image]) -> Sample:
    """The image and, if there is one, its mask after the same change."""
    return {key: change(sample[key]) for key in ("image", "mask") if key in sample}


class Resize(Transform):
    """Resizes an image until it just covers `size`: aspect kept, bilinear, antialiased.

    Sets `original_size`, (width, height) before, unless a transform has set it. Only the middle is kept of an
    image whose long side is more than `MAX_RATIO` times the short one: a line would become gigabytes.

    Args:
        size: (width, height) in pixels; a number is a square's side.
    """

    def __init__(self, size: int | Size) -> None:
        self.size = _size(size, "Resize")

    def for_shape(self, shape: Size) -> "Resize":
        return Resize(shape)

    def effect(self, size: Size | None) -> tuple[Size | None, bool]:
        return size and self._resized(size), False

    def _resized(self, size: Size) -> Size:
        width, height = (min(side, MAX_RATIO * min(size)) for side in size)
        scale = max(self.size[0] / width, self.size[1] / height)
        return max(self.size[0], round(width * scale)), max(self.size[1], round(height * scale))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image: Image.Image = sample["image"]
        return {"original_size": image.size, **sample, **_change(sample, self._resize)}

    def _resize(self, image: Image.Image) -> Image.Image:
        longest = MAX_RATIO * min(image.size)
        if max(image.size) > longest:
            left, top = (max(0, side - longest) // 2 for side in image.size)
            image = image.crop((left, top, left + min(image.width, longest), top + min(image.height, longest)))
        # When shrinking more than six times a box filter does the first step; the difference is not visible.
        return image.resize(self._resized(image.size), Image.Resampling.BILINEAR, reducing_gap=3.0)


class Crop(Transform):
    """Crops an image to `size` at a random position, or from the centre with random=False.

    Sets `crop_top_left`, (top, left) in pixels of the incoming image, `crop_from`, the incoming (width, height), and
    `original_size` unless a transform has set it. The image must be at least as large.

    Args:
        size: (width, height) in pixels; a number is a square's side.
        random: default True.
    """

    def __init__(self, size: int | Size, random: bool = True) -> None:
        self.size = _size(size, "Crop")
        self.random = random

    def for_shape(self, shape: Size) -> "Crop":
        return Crop(shape, self.random)

    def effect(self, size: Size | None) -> tuple[Size, bool]:
        return self.size, self.random and size != self.size

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image: Image.Image = sample["image"]
        (width, height), (to_width, to_height) = image.size, self.size
        message = f"Crop got an image of {width}x{height}; expected at least {to_width}x{to_height}"
        require(width >= to_width and height >= to_height, f"{message}; put Resize of this size before it")
        room = (height - to_height, width - to_width)
        top, left = (int(share * (free + 1)) if self.random else free // 2 for share, free in zip(rng.random(2), room))
        box = (left, top, left + to_width, top + to_height)
        records = {"crop_top_left": (top, left), "crop_from": image.size}
        return {"original_size": image.size, **sample, **_change(sample, lambda image: image.crop(box)), **records}


def _size(size: int | Size, name: str) -> Size:
    width, height = (size, size) if isinstance(size, int) else size
    require(min(width, height) >= 1, f"{name} got size={size}; expected at least 1 pixel")
    check_side(f"{name} size", max(width, height))
    return width, height


def square_transforms(side: int) -> list[AnyTransform]:
    """The centre of any image as a tensor of `side` pixels a side, with the true conditions."""
    return [Resize(side), Crop(side, random=False), ToTensor()]


def center_crop(image: Image.Image, size: int | Size) -> Image.Image:
    """The centre of an image, as Resize and Crop make it without chance."""
    rng = np.random.default_rng(0)
    return Crop(size, random=False)(Resize(size)({"image": image}, rng), rng)["image"]


class Flip(Transform):
    """Mirrors the image left to right with probability `p`, default 0.5.

    After a crop, the crop's left edge is measured in the mirrored image, which is what the model sees.
    """

    def __init__(self, p: float = 0.5) -> None:
        require(0 <= p <= 1, f"Flip got p={p}; expected a probability from 0 to 1")
        self.p = p

    def effect(self, size: Size | None) -> tuple[Size | None, bool]:
        return size, 0 < self.p < 1

    def mirroring(self, p: float) -> "Flip":
        return Flip(p)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if rng.random() >= self.p:
            return sample
        image: Image.Image = sample["image"]
        flipped = {**sample, **_change(sample, lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))}
        if "crop_top_left" in sample:
            top, left = sample["crop_top_left"]
            flipped["crop_top_left"] = (top, sample["crop_from"][0] - image.width - left)
        return flipped


class ToTensor(Transform):
    """Turns the image and the records of earlier transforms into tensors.

    Sets `image`, (3, H, W) float32 in [0, 1], and `micro_conds`, (5,) float32: original width, original height, crop
    top, crop left, in pixels, and the aesthetic score, default 6.0 (the order of diffusers' `train_amused.py`).
    """

    def __init__(self, aesthetic_score: float = 6.0) -> None:
        self.aesthetic_score = aesthetic_score

    def effect(self, size: Size | None) -> tuple[Size | None, bool]:
        return size, False

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        import torch  # here, since a data set is looked at before torch is imported

        image: Image.Image = sample["image"]
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
        size, corner = sample.get("original_size", image.size), sample.get("crop_top_left", (0, 0))
        micro_conds = torch.tensor([*size, *corner, self.aesthetic_score], dtype=torch.float32)
        records = ("original_size", "crop_top_left", "crop_from")
        others = {key: value for key, value in sample.items() if key not in records}
        return {**others, "image": pixels, "micro_conds": micro_conds}


class TokenRegion(Transform):
    """Turns the mask into how much of each token is learnt; the last of the image transforms, in data with masks.

    Sets `region`, uint8 (h,w) from 0 to 255: the mask's mean over the token's f x f pixels. Without a mask it is 255.

    Args:
        pixels_per_token: f, along a side. None: the mask is removed, and the image counts whole.
    """

    def __init__(self, pixels_per_token: int | None) -> None:
        self.pixels_per_token = pixels_per_token

    def effect(self, size: Size | None) -> tuple[Size | None, bool]:
        return size, False

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        import torch  # as above

        others, mask, f = dict(sample), sample.get("mask"), self.pixels_per_token
        others.pop("mask", None)
        if f is None or not isinstance(sample["image"], torch.Tensor):  # the model's transform refuses the latter
            return others
        height, width = sample["image"].shape[-2:]
        if mask is None:
            return {**others, "region": torch.full((height // f, width // f), 255, dtype=torch.uint8)}
        got = f"a transform made the image {width}x{height} px and left its mask {mask.width}x{mask.height}"
        require(mask.size == (width, height), f"{got}; change sample['mask'] alike, or set unmasked_weight=1")
        height, width = height // f, width // f
        sums = np.asarray(mask, dtype=np.int64)[: height * f, : width * f].reshape(height, f, width, f).sum(axis=(1, 3))
        return {**others, "region": torch.from_numpy(((2 * sums + f * f) // (2 * f * f)).astype(np.uint8))}


class TokenWeights(Transform):
    """Turns a sample's `region` into `token_weights`, float32 (h,w): u + (1 - u) * region / 255.

    Args:
        unmasked: u, the weight of a token in the black; 0: it is not learnt.
    """

    def __init__(self, unmasked: float) -> None:
        require(0 <= unmasked <= 1, f"unmasked_weight got {unmasked}; expected a number from 0 to 1")
        self.unmasked = unmasked

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        others = {key: value for key, value in sample.items() if key != "region"}
        if "region" not in sample:  # an image of another data set
            return others
        shares = sample["region"].numpy() / 255
        return {**others, "token_weights": np.float32(self.unmasked + (1 - self.unmasked) * shares)}


class VaryTags(Transform):
    """Changes the order of a caption's tags, "1girl, red hair, hat", and leaves some of them out.

    A caption of at most `keep` tags stays as it was. In any other, spaces around tags and empty tags are removed.

    Args:
        shuffle: whether the tags after the first `keep` change their order, default True.
        drop: probability with which each of these is left out, default 0.
        keep: how many of the first tags are always kept, in their order, default 1.
        separator: what is between two tags, default ",". A space follows it in the new caption.
    """

    def __init__(self, shuffle: bool = True, drop: float = 0.0, keep: int = 1, separator: str = ",") -> None:
        require(0 <= drop <= 1, f"drop_tags got {drop}; expected a probability from 0 to 1")
        require(keep >= 0, f"keep_tags got {keep}; expected 0 or more")
        require(separator != "", "tag_separator got ''; expected what is between two tags, such as ','")
        self.shuffle, self.drop, self.keep, self.separator = shuffle, drop, keep, separator

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        tags = [tag.strip() for tag in sample["text"].split(self.separator) if tag.strip()]
        first, rest = tags[: self.keep], tags[self.keep :]
        ranks, shares = rng.random((2, len(rest)))
        if not rest:
            return sample
        order = ranks.argsort() if self.shuffle else range(len(rest))
        kept = [rest[index] for index in order if shares[index] >= self.drop]
        return {**sample, "text": f"{self.separator.rstrip()} ".join(first + kept)}


class DropCaption(Transform):
    """Replaces the caption by "" with probability `p`, default 0.1: guidance needs the unconditional case.

    Sets `caption_dropped`, whether it did.
    """

    def __init__(self, p: float = 0.1) -> None:
        require(0 <= p <= 1, f"DropCaption got p={p}; expected a probability from 0 to 1")
        self.p = p

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        dropped = rng.random() < self.p
        return {**sample, "text": "" if dropped else sample["text"], "caption_dropped": dropped}
