"""Reading one image: whatever PIL opens, as upright RGB on white."""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

from diffengine.datasets.base import Size, UnreadableImage
from diffengine.files import check_regular
from diffengine.text import one_line

FADED = 0.75  # share of white where an image is not learnt
ORIENTATION_TAG = 0x0112
# EXIF orientation -> the transpose that turns the image upright. 1 and unknown values need none.
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip

# The first bytes of a file -> what is near its end.
END_OF = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}
LONGEST_END = 64

# What PIL's decoders raise for damaged files: SyntaxError is PIL's "broken file", RuntimeError the AVIF decoder's.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, OverflowError, EOFError, RuntimeError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def read_image(source: bytes | str, name: str) -> Image.Image:
    """Decode bytes or a file to RGB: EXIF rotation applied, transparency composited on white, first frame only.

    16-bit grey is scaled to 8 bits (65535 is white). 32-bit integers count as 0..65535 and floats as 0..1. Values
    outside are refused, since no scale could be guessed. `name` is what an `UnreadableImage` calls the image.
    """
    with _opened(source, name) as image:
        return _upright_rgb(image)


def read_mask(source: bytes | str, name: str) -> Image.Image:
    """Decode a mask to mode L, 255 where the image is learnt: read as an image, and then grey.

    Refused are transparent pixels, which could mean either, and masks of 0 and 1, which would be black.
    """
    with _opened(source, name) as image:
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
            raise ValueError("it is a mask with transparent pixels, expected black and white; save it without alpha")
        mask = _upright_rgb(image).convert("L")
        if mask.getextrema()[1] == 1:
            raise ValueError("it is a mask of 0 and 1, which are both black; save white as 255")
        return mask


def read_size(source: bytes | str, name: str) -> Size:
    """(width, height) in pixels of what `read_image` returns, from the header alone.

    A PNG may carry its EXIF block after the pixels, which this does not read.
    """
    with _opened(source, name) as image:
        width, height = image.size
        turned = _orientation(image) >= 5 and image.format != "TIFF"  # PIL reports a TIFF's size upright
        return (height, width) if turned else (width, height)


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    transpose = UPRIGHT.get(_orientation(image))
    rgb = _to_rgb(image)
    return rgb if transpose is None else rgb.transpose(transpose)


def read_small(source: bytes | str, name: str, side: int) -> Image.Image:
    """As `read_image`, of at most `side` pixels a side: decodes every byte of a file, a JPEG at a lower resolution."""
    with _opened(source, name) as image:
        image.draft(None, (side, side))
        small = _upright_rgb(image)
        small.thumbnail((side, side), Image.Resampling.BOX)
        return small


def check_mask_size(name: str, size: Size, image: str, image_size: Size) -> None:
    """Raise an UnreadableImage unless a mask is as large as its image; `name` and `image` are what it calls them."""
    sizes = [f"{width}x{height}" for width, height in (size, image_size)]
    if size != image_size:
        raise UnreadableImage(f"{name} has {sizes[0]} px and its image {image} {sizes[1]}; give both one size")


def faded(image: Image.Image, mask: Image.Image | None) -> Image.Image:
    """An image that is nearly white where its mask, of any size, is black."""
    if mask is None:
        return image
    learnt = mask.resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(image, Image.blend(image, Image.new("RGB", image.size, "white"), FADED), learnt)


def ends_early(source: bytes | str) -> bool:
    """Whether a JPEG or PNG lacks its end, as one that was cut off does; some whole files have more after it."""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            end = END_OF.get(file.read(4)[:2])
            file.seek(-min(LONGEST_END, file.seek(0, os.SEEK_END)), os.SEEK_END)
            return end is not None and end not in file.read()
    except OSError:
        return False


def _formats() -> list[str]:
    """What PIL decodes itself: an EPS is a program, which it has Ghostscript run."""
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


@contextmanager
def _opened(source: bytes | str, name: str) -> Iterator[Image.Image]:
    try:
        if not isinstance(source, bytes):
            check_regular(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
            yield image
    except DECODE_ERRORS as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "it is in no format that PIL knows" if unknown else one_line(error)
        advice = "fix it, remove it, or set --cfg-options skip_unreadable=True"
        raise UnreadableImage(f"{name} cannot be read as an image: {reason}; {advice}") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if the EXIF block is damaged, as image viewers do."""
    try:
        # The base class's method: the PNG class would decode all pixels to find a late EXIF block.
        value = Image.Image.getexif(image).get(ORIENTATION_TAG, 1)
    except DECODE_ERRORS:
        return 1
    return value if value in UPRIGHT else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bit(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale grey of 16 or 32 bits per pixel to 8. PIL's own conversion clips at 255, which is nearly all white."""
    values = np.asarray(image)
    top = 1 if image.mode == "F" else 65535
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):  # also refuses NaN
        raise ValueError(f"its pixels lie from {low} to {high}, expected 0 to {top}; save it with 8 bits")
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
