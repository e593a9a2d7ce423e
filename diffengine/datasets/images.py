"""Reading one image: whatever PIL opens, as upright RGB on white."""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from diffengine.errors import UserError

# What travels from a data set to the batch: "image", "text", and what the transforms add.
Sample = dict[str, Any]

ORIENTATION_TAG = 0x0112
# EXIF orientation -> the turn that brings the image upright; 1 and unknown values need none.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What PIL's decoders raise on damaged files. SyntaxError is how they say "broken file".
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    EOFError,
    RuntimeError,  # the AVIF decoder
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def texts_in(text: str | list[str]) -> list[str]:
    """An image's captions, of which a sample may have one or a list."""
    return [text] if isinstance(text, str) else list(text)


class UnreadableImage(UserError):
    """An image that cannot be decoded; names the file or the row."""


def read_image(source: bytes | str, name: str) -> Image.Image:
    """The image as RGB, its EXIF rotation applied, transparency laid onto white, the first frame of many.

    source: the encoded bytes, or the path of a file. name: what errors call it.
    16-bit grey is scaled to 8 bits (65535 is white). 32-bit integers are taken as 0..65535 and floats as
    0..1; values outside are refused, since no scale could be guessed. Raises UnreadableImage.
    """
    with _opened(source, name) as image:
        image.load()
        turn = UPRIGHT.get(_orientation(image))
        rgb = _to_rgb(image)
        return rgb if turn is None else rgb.transpose(turn)


def read_size(source: bytes | str, name: str) -> tuple[int, int]:
    """(width, height) in pixels of what `read_image` gives, from the header alone.

    A PNG may carry its EXIF behind the pixels, where this does not look. Raises UnreadableImage.
    """
    with _opened(source, name) as image:
        width, height = image.size
        turned = _orientation(image) >= 5 and image.format != "TIFF"  # whose size PIL gives upright
        return (height, width) if turned else (width, height)


@contextmanager
def _opened(source: bytes | str, name: str) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            yield image
    except DECODE_ERRORS as error:
        known = not isinstance(error, UnidentifiedImageError)
        reason = str(error) or type(error).__name__ if known else "it is in no format that PIL knows"
        raise UnreadableImage(
            f"{name} cannot be read as an image: {' '.join(reason.split())}; mend it, remove it, "
            "or set skip_unreadable=True"
        ) from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where the EXIF block is damaged, as image viewers do."""
    try:
        # The base class's method: the PNG class would decode all pixels to look for a late EXIF block.
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
    """Grey of 16 or 32 bits per pixel to 8. PIL's own conversion would clip at 255: nearly all white."""
    values = np.asarray(image)
    top = 1 if image.mode == "F" else 65535
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):  # written so that NaN is refused too
        raise ValueError(f"its pixels lie from {low} to {high}, expected 0 to {top}; save it with 8 bits")
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
