"""`diffengine data`: one screen, and a page."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffengine import inspect_data
from diffengine.cli import main
from tests.support.browser import browser, find
from tests.support.models import make_model_folder
from tests.support.photos import write_newcomer_folder, write_photo_folder


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("newcomer") / "mine"
    write_newcomer_folder(folder)
    return folder


def data_of(page: Path) -> dict:
    (text,) = re.findall('<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    return json.loads(text)


def test_one_screen_the_worst_first(newcomer: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.chdir(newcomer.parent)
    assert main(["data", "mine"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mine: 2 things stop training, 6 may hurt"
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 40
    assert [line for line in lines if line.isupper()] == ["STOPS TRAINING", "MAY HURT"]
    starts = [line[:24] for line in lines if line.startswith("- ")]
    assert starts[:2] == ["- mine/cut.jpg cannot be", "- mine/page.png cannot b"]
    assert [line.split()[2] for line in lines if line.startswith("- ")][2:5] == ["caption", "caption", "images"]
    assert "cut off   3.4% of the area; 32.5% by the 512 px square" in lines


def test_skipped_images_do_not_stop(newcomer: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", str(newcomer), "--cfg-options", "skip_unreadable=True"]) == 0
    printed = capsys.readouterr().out
    assert "nothing stops training" in printed
    assert "- 2 images are not readable: cut.jpg, page.png" in printed


def test_captions_are_wrong_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_photo_folder(tmp_path, 3, 48, "txt")
    (tmp_path / "cat.txt").unlink()
    (tmp_path / "coffee.jpg").write_text("no image")
    page = tmp_path / "page.html"
    assert main(["data", str(tmp_path), "-o", str(page)]) == 2
    assert "2 things stop" in " ".join(capsys.readouterr().out.split())
    assert [problem.split(": ")[0].rpartition("/")[2] for problem in data_of(page)["problems"]][1] == (
        "coffee.jpg cannot be read as an image"
    )
    assert len(data_of(page)["images"]) == 2


def test_no_torch_without_a_config(newcomer: Path) -> None:
    program = f"import sys\nfrom diffengine.cli import main\nassert main(['data', {str(newcomer)!r}]) == 2\n"
    program += "assert not {'torch', 'diffusers', 'transformers', 'mmengine'} & sys.modules.keys()\n"
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_with_a_model(newcomer: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    make_model_folder(tmp_path / "model", "toy")
    text = "extends = 'amused_512_own'\nresolution = 32\npretrained = 'model'\nmax_epochs = None\nmax_iters = 1\n"
    (tmp_path / "own.py").write_text(text)
    assert main(["data", str(newcomer), "--config", "own.py", "-o", "page.html"]) == 2
    printed = capsys.readouterr().out
    assert "captions are longer than 64 tokens; the longest has 1607 and loses its last" in printed
    assert re.search(r"round trip +PSNR [\d.]+ dB of [78] images", printed)
    page = data_of(tmp_path / "page.html")
    assert len(page["trips"]) in (7, 8)
    assert all(trip["image"].startswith("data:image/webp") and 0 < trip["psnr"] < 100 for trip in page["trips"])
    found = inspect_data(newcomer, config="own.py")
    assert found.cut[0][1] == 1607
    assert main(["data", str(newcomer), "--config", "own.py", "--cfg-options", "pretrained=none"]) == 2
    assert "the model of own.py cannot be loaded: " in capsys.readouterr().out


@pytest.mark.parametrize("output", ["page.txt", "missing/page.html"])
def test_an_output_that_cannot_be_written(tmp_path: Path, monkeypatch, capsys, output: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_photo_folder(tmp_path / "photos", 2, 48)
    assert main(["data", "photos", "-o", output]) == 2
    assert output in capsys.readouterr().err


@pytest.mark.skipif(find() is None, reason="chromium is not installed: apt-get install chromium")
def test_the_page_in_a_browser(newcomer: Path, tmp_path: Path) -> None:
    """Its images are shown with their crops, its texts are text, and it sends no request."""
    file = tmp_path / "page.html"
    assert main(["data", str(newcomer), "-o", str(file)]) == 2
    with browser() as page:
        for width, dark in ((1400, False), (390, True)):
            page.requests.clear()
            page.open(file, width=width, dark=dark)
            assert page.errors == []
            assert [url for url in page.requests if not url.startswith("data:")] == [file.resolve().as_uri()]
            assert page.run("document.documentElement.scrollWidth") <= width
        assert page.run("document.querySelector('.chip').textContent") == "stops training"
        assert page.run("document.querySelectorAll('#images figure').length") == 35
        assert page.run("document.querySelectorAll('main script').length") == 0
        shown = "[...document.querySelectorAll('#images figure')].find((each) => each.textContent.startsWith('%s'))"
        caption = page.run(f"{shown % 'tiny.png'}.querySelector('p').textContent")
        assert caption.startswith("<script>alert(1)</script> ")
        width = page.run(f"{shown % 'wide.jpg'}.querySelector('.kept').getBoundingClientRect().width")
        whole = page.run(f"{shown % 'wide.jpg'}.querySelector('img').getBoundingClientRect().width")
        assert width / whole == pytest.approx(0.5, abs=0.02)  # 4:1 is cropped to 2:1
