"""Masks of images: how they are found and read, and that they follow the image."""

import json

import datasets as hf
import numpy as np
import pytest
import torch
from PIL import Image

from diffengine.datasets import Crop, Flip, ImageTextDataset, Resize, SubjectDataset, ToTensor, UnreadableImage, inspect
from diffengine.datasets.images import faded
from diffengine.datasets.transforms import TokenRegion, TokenWeights
from diffengine.errors import UserError
from tests.support.photos import all_captions


def rng():
    return np.random.default_rng(0)


def image(file, width=4, height=3, value=0, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (value, value, value)).save(file, **options)
    return file


def grey(file, value=255, size=(4, 3), mode="L"):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(file)
    return file


def values(dataset):
    """The first value of each image's mask, None without one."""
    samples = [dataset[index] for index in range(len(dataset))]
    return [sample["mask"].getpixel((0, 0)) if "mask" in sample else None for sample in samples]


def test_a_mask_is_found_by_its_name_and_is_no_image(tmp_path):
    for name in ("a.jpg", "deep/b.png", "c.v2.webp", "mask.png"):
        image(tmp_path / name).with_suffix(".txt").write_text(name)
    grey(tmp_path / "a.mask.png", 255)
    grey(tmp_path / "c.v2.mask.png", 128)
    grey(tmp_path / "deep" / "b.mask.png", 1, mode="1")
    dataset = ImageTextDataset(str(tmp_path))
    assert all_captions(dataset) == ["a.jpg", "c.v2.webp", "deep/b.png", "mask.png"]
    assert dataset.has_masks
    assert values(dataset) == [255, 128, 255, None]
    assert dataset[0]["mask"].mode == "L"
    names = ["a.jpg", "a.mask.png", "c.v2.webp", "c.v2.mask.png", "deep/b.png", "deep/b.mask.png", "mask.png"]
    assert dataset.files() == [tmp_path / name for name in names]
    assert values(ImageTextDataset(str(tmp_path), caption="x")) == [255, 128, 255, None]
    assert values(ImageTextDataset(str(tmp_path / "a.jpg"))) == [255]
    subject = SubjectDataset(str(tmp_path), "sks")
    assert (subject.has_masks, values(subject)) == (True, [255, 128, 255, None])


def test_data_without_masks_is_as_before(tmp_path):
    image(tmp_path / "a.png")
    dataset = ImageTextDataset(str(tmp_path), caption="x")
    assert not dataset.has_masks
    assert dataset[0].keys() == {"image", "text"}
    assert dataset.files() == [tmp_path / "a.png"]


@pytest.mark.parametrize("name", ["b.mask.png", "A.MASK.PNG"])
def test_a_mask_without_its_image(tmp_path, name):
    image(tmp_path / "a.png")
    grey(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} is no mask of an image here; .* NAME.mask.png; rename or remove it$"):
        ImageTextDataset(str(tmp_path), caption="x")


def test_masks_that_cannot_be_used(tmp_path):
    image(tmp_path / "a.png")
    mask = grey(tmp_path / "a.mask.png", size=(3, 4))
    dataset = ImageTextDataset(str(tmp_path), caption="x")
    expected = rf"{mask} has 3x4 px and its image {tmp_path / 'a.png'} 4x3; give both one size$"
    with pytest.raises(UnreadableImage, match=expected):
        dataset[0]
    assert (
        inspect(dataset, seconds=0).images[0].problem
        == f"{mask} has 3x4 px and its image {tmp_path / 'a.png'} 4x3; give both one size"
    )
    for value, mode, problem in ((1, "L", "0 and 1"), ((255, 128), "LA", "transparent pixels")):
        grey(mask, value, mode=mode)
        with pytest.raises(UnreadableImage, match=rf"{mask} .*{problem}"):
            dataset[0]
        assert problem in (inspect(dataset).unreadable[0].problem or "")
    grey(mask, (255, 255), mode="LA")
    grey(tmp_path / "a.mask.png", 0)
    assert values(dataset) == [0]  # black is a mask, too
    mask.write_bytes(mask.read_bytes()[:40])
    with pytest.raises(UnreadableImage, match=rf"^{mask} cannot be read"):
        dataset[0]


def test_a_mask_is_turned_by_its_exif_block_as_the_image_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image(tmp_path / "a.png", exif=exif)
    grey(tmp_path / "a.mask.png", size=(3, 4))
    assert ImageTextDataset(str(tmp_path), caption="x")[0]["mask"].size == (3, 4)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_column_of_masks_in_metadata(tmp_path, ending):
    for name in ("a", "b", "c"):
        image(tmp_path / f"{name}.png")
    grey(tmp_path / "masks" / "one.png", 200)
    grey(tmp_path / "b.mask.png", 100)
    rows = [("a.png", "masks/one.png"), ("b.png", "b.mask.png"), ("c.png", "")]
    if ending == "csv":
        text = "file_name,text,region\n" + "".join(f"{name},x,{mask}\n" for name, mask in rows)
    else:
        records = [{"file_name": name, "text": "x", "region": mask or None} for name, mask in rows]
        text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / f"metadata.{ending}").write_text(text)
    assert values(ImageTextDataset(str(tmp_path), mask_column="region")) == [200, 100, None]
    with pytest.raises(UserError, match=r"1 of 4 images .* have no caption: .*one.png"):
        ImageTextDataset(str(tmp_path))
    with pytest.raises(UserError, match=r"has no column 'mask'; it has file_name, text, region; .* mask_column=NAME"):
        ImageTextDataset(str(tmp_path), mask_column="mask")
    (tmp_path / f"metadata.{ending}").write_text(text.replace("b.mask.png", "d.png"))
    with pytest.raises(UserError, match=r"line . names the mask 'd.png', which does not exist"):
        ImageTextDataset(str(tmp_path), mask_column="region")


def test_masks_outside_of_the_folder(tmp_path):
    image(tmp_path / "data" / "a.png")
    grey(tmp_path / "secret.png")
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text,mask\na.png,x,../secret.png\n")
    with pytest.raises(UserError, match="outside of its folder"):
        ImageTextDataset(str(tmp_path / "data"), mask_column="mask")
    assert values(ImageTextDataset(str(tmp_path / "data"), mask_column="mask", allow_outside=True)) == [255]


@pytest.mark.parametrize("embedded", [True, False])
def test_a_column_of_masks_in_a_table(tmp_path, embedded):
    files = [str(image(tmp_path / f"{name}.png")) for name in "ab"]
    masks = [str(grey(tmp_path / "m.png", 50)), None]
    features = hf.Features(image=hf.Image(), text=hf.Value("string"), cover=hf.Image())
    rows = hf.Dataset.from_dict({"image": files, "text": ["x", "y"], "cover": masks}, features=features)
    if embedded:
        rows.to_parquet(tmp_path / "table.parquet")
        path = tmp_path / "table.parquet"
    else:
        rows.save_to_disk(tmp_path / "saved")
        path = tmp_path / "saved"
    options = {"image_column": "image", "mask_column": "cover", "allow_outside": True}
    dataset = ImageTextDataset(str(path), **options)
    assert values(dataset) == [50, None]
    assert dataset[0].keys() == {"image", "text", "mask"}
    with pytest.raises(UserError, match=r"column 'text' of .* holds .*; expected images; .* mask_column=NAME"):
        ImageTextDataset(str(path), **{**options, "mask_column": "text"})


def coordinates(width, height):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, x + y], axis=-1).astype(np.uint8))


def test_a_mask_moves_with_its_image():
    """A mask that is the image's third channel stays so through resize, crop and mirror."""
    generator, seen = rng(), set()
    for _ in range(40):
        pixels = coordinates(70, 50)
        sample = {"image": pixels, "mask": pixels.getchannel("B"), "text": ""}
        for transform in (Resize(32), Flip(0.5), Crop(24)):
            sample = transform(sample, generator)
        assert np.array_equal(np.asarray(sample["mask"]), np.asarray(sample["image"])[..., 2])
        seen.add((*sample["crop_top_left"], sample["image"].getpixel((0, 0))))
    assert len(seen) > 20
    line = coordinates(200, 2)  # its middle is cropped first
    long = Resize(4)({"image": line, "mask": line.getchannel("B")}, rng())
    assert np.array_equal(np.asarray(long["mask"]), np.asarray(long["image"])[..., 2])


def test_masks_draw_nothing():
    pixels = coordinates(70, 50)
    states = []
    for sample in ({"image": pixels}, {"image": pixels, "mask": pixels.getchannel("R")}):
        generator = rng()
        for transform in (Resize(32), Flip(0.5), Crop(24), ToTensor(), TokenRegion(4), TokenWeights(0.1)):
            sample = transform(sample, generator)
        states.append(generator.random())
    assert states[0] == states[1]


def test_a_tokens_weight_is_the_mean_over_its_pixels():
    mask = np.random.default_rng(3).integers(0, 256, (8, 12), np.uint8)
    mask[:4, :4], mask[4:, 8:] = 0, 255
    sample = {"image": torch.zeros(3, 8, 12), "mask": Image.fromarray(mask)}
    region = TokenRegion(4)(sample, rng())
    assert region.keys() == {"image", "region"}
    assert (region["region"].dtype, region["region"].shape) == (torch.uint8, (2, 3))
    weighted = TokenWeights(0.1)(region, rng())
    assert weighted.keys() == {"image", "token_weights"}
    assert weighted["token_weights"].dtype == np.float32
    expected = [
        [np.mean(0.1 + 0.9 * (mask[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] / 255)) for j in range(3)] for i in range(2)
    ]
    assert weighted["token_weights"] == pytest.approx(np.array(expected), abs=0.9 / 510 + 1e-6)
    assert weighted["token_weights"][0, 0] == np.float32(0.1)
    assert weighted["token_weights"][1, 2] == 1
    whole = TokenRegion(4)({"image": torch.zeros(3, 8, 12)}, rng())
    assert whole["region"].tolist() == [[255] * 3] * 2
    assert TokenRegion(None)(sample, rng()).keys() == {"image"}
    with pytest.raises(UserError, match="made the image 8x8 px and left its mask 12x8"):
        TokenRegion(4)({**sample, "image": torch.zeros(3, 8, 8)}, rng())


def test_what_is_not_learnt_is_faded(tmp_path):
    """On the page of the data and, by tokens, on that of a run."""
    shown = faded(Image.new("RGB", (8, 4), (200, 100, 0)), Image.fromarray(np.array([[255, 0]], np.uint8)))
    assert [shown.getpixel((x, 2)) for x in (0, 3, 4, 7)] == [(200, 100, 0)] * 2 + [(241, 216, 191)] * 2
    image(tmp_path / "a.png", 8, 8)
    image(tmp_path / "b.png", 8, 8)
    grey(tmp_path / "b.mask.png", 0, (8, 8))
    thumbnails = {}
    found = inspect(ImageTextDataset(str(tmp_path), caption="x"), each=thumbnails.__setitem__)
    assert found.summary == "2 images (1 with a mask) of 8x8"
    assert [thumbnails[index].getpixel((4, 4)) for index in range(2)] == [(0, 0, 0), (191, 191, 191)]
