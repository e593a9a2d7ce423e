import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

from diffengine.datasets.images import UnreadableImage, read_image, read_size


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def read(data):
    return np.asarray(read_image(data, "it"))


def gradient(width=6, height=4):
    """All pixels differ, so that a wrong rotation or flip shows."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 40, y * 60, x + 10 * y], axis=-1).astype(np.uint8)


# How each EXIF orientation stores an upright image, from the EXIF standard. The comments name the sides of the upright
# image where the first stored row and the first stored column are.
STORED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],  # top, right
    3: lambda p: p[::-1, ::-1],  # bottom, right
    4: lambda p: p[::-1],  # bottom, left
    5: lambda p: p.transpose(1, 0, 2),  # left, top
    6: lambda p: p.transpose(1, 0, 2)[::-1],  # right, top
    7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
    8: lambda p: p.transpose(1, 0, 2)[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_every_exif_orientation_is_read_upright(orientation, format):
    upright = gradient()
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))), format, exif=exif)
    np.testing.assert_array_equal(read(data), upright)
    assert read_size(data, "it") == (6, 4)


def test_exif_of_a_jpeg_photo(photo):
    stored = Image.fromarray(np.asarray(photo).transpose(1, 0, 2)[::-1].copy())
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = read(encoded(stored, "JPEG"))
    np.testing.assert_array_equal(read(encoded(stored, "JPEG", exif=exif)), np.rot90(plain, -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")  # PIL warns too
@pytest.mark.parametrize("block", [b"Exif\0\0not a TIFF header", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_damaged_exif_is_ignored(block):
    data = encoded(Image.fromarray(gradient()), "JPEG", exif=block)
    np.testing.assert_array_equal(read(data), read(encoded(Image.fromarray(gradient()), "JPEG")))


@pytest.fixture
def photo():
    skimage = pytest.importorskip("skimage")
    with Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png") as image:
        return image.convert("RGB").resize((48, 32))


def test_transparency_is_composited_on_white():
    alpha = np.array([[0, 51, 255]], np.uint8)
    pixels = np.dstack([np.full((1, 3), 200, np.uint8), np.zeros((1, 3, 2), np.uint8)])
    rgba = Image.fromarray(np.dstack([pixels, alpha]))
    # white * (1 - a) + color * a: 255 * 0.8 + 200 * 0.2 = 244
    np.testing.assert_array_equal(read(encoded(rgba))[0], [[255, 255, 255], [244, 204, 204], [200, 0, 0]])


def test_transparent_grey_and_palette_are_composited_on_white():
    la = Image.new("LA", (2, 1))
    la.putdata([(90, 0), (90, 255)])
    assert read(encoded(la)).tolist() == [[[255] * 3, [90] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putdata([0, 1])
    assert read(encoded(palette, transparency=0)).tolist() == [[[255] * 3, [10, 20, 30]]]
    assert read(encoded(palette)).tolist() == [[[0] * 3, [10, 20, 30]]]
    grey = Image.new("L", (2, 1))
    grey.putdata([7, 90])
    assert read(encoded(grey, transparency=7)).tolist() == [[[255] * 3, [90] * 3]]


def test_16_bit_grey_keeps_its_shades():
    shades = np.arange(256, dtype=np.uint16).reshape(16, 16)
    grey = read(encoded(Image.fromarray(shades * 257)))
    np.testing.assert_array_equal(grey, np.repeat(shades[..., None], 3, axis=2))


def test_integers_and_floats_are_scaled_or_rejected():
    ints = Image.fromarray(np.array([[0, 32896, 65535]], np.int32))
    assert read(encoded(ints, "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    floats = Image.fromarray(np.array([[0, 0.2, 1]], np.float32))
    assert read(encoded(floats, "TIFF"))[0, :, 0].tolist() == [0, 51, 255]
    for values in ([0, 2.0], [-0.1, 0], [float("nan"), 0]):
        odd = Image.fromarray(np.array([values], np.float32))
        with pytest.raises(UnreadableImage, match=r"it cannot be read.*expected 0 to 1; save it with 8 bits"):
            read(encoded(odd, "TIFF"))
    with pytest.raises(UnreadableImage, match="from 0 to 65536, expected 0 to 65535"):
        read(encoded(Image.fromarray(np.array([[0, 65536]], np.int32)), "TIFF"))


def test_bilevel_and_cmyk():
    assert read(encoded(Image.fromarray(np.array([[True, False]])))).tolist() == [[[255] * 3, [0] * 3]]
    cmyk = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    assert read(encoded(cmyk, "TIFF")).tolist() == [[[255, 0, 0]]]


def test_first_frame_of_an_animation_is_read():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read(data).reshape(-1, 3).tolist() == [[255, 0, 0]] * 16


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_truncated_image_is_an_error(format, photo):
    data = encoded(photo, format)
    with pytest.raises(UnreadableImage, match=r"^row 7 of it cannot be read as an image: .*skip_unreadable=True$"):
        read_image(data[: len(data) * 2 // 3], "row 7 of it")


def test_text_and_missing_files_are_errors(tmp_path):
    (tmp_path / "note.png").write_text("no image")
    with pytest.raises(UnreadableImage, match=r"note.png cannot be read as an image: it is in no format that PIL"):
        read_image(str(tmp_path / "note.png"), "note.png")
    with pytest.raises(UnreadableImage, match=r"gone.png cannot be read as an image: .*No such file"):
        read_size(str(tmp_path / "gone.png"), "gone.png")


def test_size_is_read_from_the_header(monkeypatch):
    data = encoded(Image.fromarray(gradient()))

    def load(self):
        raise AssertionError("the pixels were read")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    assert read_size(data, "it") == (6, 4)
    with pytest.raises(AssertionError, match="the pixels were read"):
        read_image(data, "it")


def test_postscript_is_not_run(tmp_path, monkeypatch):
    """PIL would have Ghostscript run it, whatever the file is called."""
    interpreter = tmp_path / "gs"
    interpreter.write_text(f"#!/bin/sh\ntouch '{tmp_path / 'ran'}'\n")
    interpreter.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # PIL looks for it once
    with pytest.raises(UnreadableImage, match=r"^it cannot be read as an image: it is in no format that PIL knows"):
        read(encoded(Image.new("RGB", (4, 4)), "EPS"))
    assert not (tmp_path / "ran").exists()
