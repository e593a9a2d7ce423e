"""What is found in a data set before anything is trained on it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffengine.cli import main
from diffengine.datasets import ImageDataset, ImageTextDataset, UnreadableImage, inspect
from diffengine.datasets.findings import Findings, look_alikes
from diffengine.datasets.inspect import look
from diffengine.datasets.shapes import Shapes
from diffengine.errors import UserError
from tests.support.photos import photos, write_newcomer_folder, write_photo_folder


class Sizes(ImageDataset):
    """Images of known sizes (None: it cannot be read), which are never decoded."""

    def __init__(self, sizes):
        self.sizes = sizes
        self.asked = []

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        raise AssertionError("no image is read")

    def all_captions(self):
        return iter([])

    def size(self, index):
        self.asked.append(index)
        if self.sizes[index] is None:
            raise UnreadableImage("broken")
        return self.sizes[index]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("newcomer") / "mine"
    assert write_newcomer_folder(folder) == ["cut.jpg", "page.png"]
    return folder


def names(groups) -> list[list[str]]:
    return [sorted(Path(image.name).name for image in group) for group in groups]


def test_area_cut_off_and_enlarged_images() -> None:
    # cut off: 0, 1/2, 3/4, 0; short sides 100, 50, 25, 10
    found = inspect(Sizes([(100, 100), (100, 50), (25, 100), (10, 10)]), Shapes(50), seconds=0)
    assert found.summary == "4 images from 10x10 to 100x100; the 50 px square cuts off 31.2% of the area"
    assert [image.size for image in found.enlarged] == [(10, 10), (25, 100)]
    assert found.warnings() == ["2 images are enlarged, the smallest 10x10: image 3, image 2"]


def test_many_images_are_sampled_evenly() -> None:
    sizes = Sizes([(10, 10)] * 1001)
    assert inspect(sizes, Shapes(8), seconds=0, most=11).summary.startswith("1,001 images (11 looked at) of 10x10")
    assert sorted(sizes.asked) == list(range(0, 1001, 100))


def test_a_newcomers_folder(newcomer: Path) -> None:
    found = inspect(ImageTextDataset(str(newcomer)), Shapes(512))
    assert names([found.unreadable]) == [["cut.jpg", "page.png"]]
    assert names(found.duplicates) == [["grey copy.jpg", "grey.jpg"]]
    assert ["again.jpg", "frames.gif", "tiny.png"] in names(found.near_duplicates)
    assert [Path(found.names(index)).name for index in found.empty] == ["alpha.png"]
    sizes = {Path(image.name).name: image.size for image in found.images}
    assert (sizes["turned.jpg"], sizes["page.png"]) == ((427, 640), None)
    assert found.summary == "37 images from 90x60 to 1000x666; the 512 px square cuts off 32.5% of the area"
    first = [line.partition(":")[0] for line in found.warnings()]
    assert first[:3] == [
        "2 images are not readable",
        "1 caption is empty",
        "1 caption has more than 60 words, the longest 605; "
        "a text encoder of 77 tokens, such as CLIP's, reads about 55",
    ]
    assert [line.partition(",")[0].partition(":")[0] for line in first[3:]] == [
        "32 images are enlarged", "1 image is a copy", "2 captions are of several images",
    ]  # fmt: skip


def test_damaged_images_come_first(tmp_path: Path) -> None:
    """Without time to decode all of them, those whose end is missing are decoded."""
    write_photo_folder(tmp_path, 40, 48)
    cut = sorted(tmp_path.glob("*.[jp][pn]g"))[17]
    cut.write_bytes(cut.read_bytes()[:-30])
    found = inspect(ImageTextDataset(str(tmp_path)), seconds=1e-9)
    assert [image.name for image in found.unreadable] == [str(cut)]
    assert 0 < sum(image.decoded for image in found.images) < 39
    assert " decoded) of 48x48" in found.summary


@pytest.mark.parametrize("format", ["jpg", "png", "webp", "gif", "tiff", "bmp"])
def test_truncated_images_are_found(tmp_path: Path, format: str) -> None:
    for name in ("whole", "cut"):
        photos()["coffee"].resize((300, 200)).save(tmp_path / f"{name}.{format}")
    cut = tmp_path / f"cut.{format}"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    found = inspect(ImageTextDataset(str(tmp_path), caption="x"))
    assert [image.name for image in found.unreadable] == [str(cut)]


def test_look_reports_captions_and_images_at_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_photo_folder(tmp_path / "data", 3, 48, "txt")
    (tmp_path / "data" / "cat.txt").unlink()
    (tmp_path / "data" / "coffee.jpg").write_text("no image")
    with pytest.raises(UserError) as caught:
        look(lambda: ImageTextDataset(str(tmp_path / "data")), "data", Shapes(32), False)
    assert caught.value.lines == [
        "data has 2 problems:",
        f"  1 of 3 images in {tmp_path / 'data'} have no caption: cat.png; give each a NAME.txt, or remove it",
        f"  {tmp_path / 'data' / 'coffee.jpg'} cannot be read as an image: it is in no format that PIL knows; "
        "fix it, remove it, or set --cfg-options skip_unreadable=True",
    ]
    (tmp_path / "data" / "cat.txt").write_text("a cat")
    look(lambda: ImageTextDataset(str(tmp_path / "data")), "data", Shapes(32), True)
    assert capsys.readouterr().out.splitlines() == [
        "data: 3 images of 48x48; the 32 px square cuts off 0.0% of the area",
        "warning: 1 image is not readable: coffee.jpg",
    ]


def test_an_error_in_the_data_comes_before_torch(tmp_path: Path) -> None:
    write_photo_folder(tmp_path / "data", 2, 48)
    (tmp_path / "data" / "cat.png").write_text("no image")
    program = (
        "import sys\nfrom diffengine.cli import main\n"
        f"assert main(['train', 'amused_512_own', '--data', {str(tmp_path / 'data')!r}]) == 2\n"
        "assert not {'torch', 'diffusers', 'transformers', 'mmengine'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, stderr=subprocess.PIPE, cwd=tmp_path)
    assert b"cat.png cannot be read as an image" in done.stderr


@pytest.mark.parametrize("command", ["train", "check", "cache"])
def test_commands_look_before_they_start(tmp_path: Path, capsys: pytest.CaptureFixture, command: str) -> None:
    write_photo_folder(tmp_path / "data", 3, 48)
    for name in ("cat.png", "coffee.jpg"):
        file = tmp_path / "data" / name
        file.write_bytes(file.read_bytes()[:-40])
    assert main([command, "amused_512_own", "--data", str(tmp_path / "data"), "--work-dir", str(tmp_path / "run")]) == 2
    first, *more = capsys.readouterr().err.splitlines()
    assert first == f"diffengine {command}: error: {tmp_path / 'data'} has 2 problems:"
    assert [line.split()[0] for line in more] == [str(tmp_path / "data" / name) for name in ("cat.png", "coffee.jpg")]
    assert not (tmp_path / "run").exists()


def test_look_alikes() -> None:
    cat, rocket = photos()["cat"], photos()["rocket"]
    noisy = np.asarray(cat).astype(int) + np.random.default_rng(0).normal(0, 6, (*cat.size[::-1], 3))
    shown = [
        cat, rocket, cat.resize((100, 66)), Image.fromarray(noisy.clip(0, 255).astype("uint8")),
        cat.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.new("RGB", (9, 9)), Image.new("RGB", (8, 8)),
    ]  # fmt: skip

    class Shown(ImageDataset):
        def __len__(self):
            return len(shown)

        def __getitem__(self, index):
            return {"image": shown[index], "text": ""}

    images = inspect(Shown(), seconds=None).images
    assert [[image.index for image in group] for group in look_alikes(images)] == [[0, 2, 3]]


def findings(*captions: str, lengths=None) -> Findings:
    return Findings(
        [], len(captions), len(captions), [[text] for text in captions], lambda index: f"image {index}", None, lengths
    )


def test_captions() -> None:
    found = findings("a", "b", "b", "c", " ", "a", "b")
    assert (found.repeated, found.empty) == ({"b": 3, "a": 2}, [4])
    assert found.warnings()[1] == "2 captions are of several images, 3 have 'b'"
    assert findings("x", "x", "x").repeated == {}  # one caption for all was meant
    tagged = findings("1girl, red hair, hat", "1girl, hat, sea, sky", "a cat, which is very fat, sits on a long mat")
    assert tagged.tags == {"1girl": 2, "hat": 2, "red hair": 1, "sea": 1, "sky": 1}
    assert findings("a, b, c", "a cat", "a dog").tags == {}


def count_words(captions):
    """The number of words of each caption, and a limit of four."""
    return [len(caption.split()) for caption in captions], 4


def test_truncated_captions_are_counted() -> None:
    captions = ["a b", "a b c d", "a b c d e", "a b c d e f g"]
    line = "2 captions are longer than 4 tokens; the longest has 7 and loses its last 3 words: 'e f g'"
    assert findings(*captions, lengths=count_words).cut_captions() == [line]
    line = "1 caption is longer than 4 tokens; the longest has 5 and loses its last 1 word: 'e'"
    assert findings(*captions[:3], lengths=count_words).cut_captions() == [line]
    assert findings(*captions[:2], lengths=count_words).cut_captions() == []
    assert findings(lengths=count_words).cut_captions() == []
    assert findings("a " * 99, lengths=lambda captions: ([0] * len(captions), 0)).cut_captions() == []
    (line,) = findings("a\nb\n" + " c\n" * 500, lengths=count_words).cut_captions()
    assert line.endswith(f"the longest has 502 and loses its last 498 words: '{'c ' * 30} … {' c' * 10}'")


def test_many_captions_are_sampled_evenly() -> None:
    asked: list[str] = []

    def lengths(captions):
        asked.extend(captions)
        return [5] * len(captions), 4

    (line,) = findings(*map(str, range(5001)), lengths=lengths).cut_captions()
    assert line.startswith("1,000 of 1,000 captions are longer than 4 tokens")
    assert asked[:3] == ["0", "5", "10"]
