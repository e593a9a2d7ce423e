"""The page in a headless Chromium, at the width of a phone and of a desk."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffengine.report import write_page
from tests.report.conftest import NASTY, Make
from tests.report.test_page import FIXTURE
from tests.support.browser import Browser, browser, find

pytestmark = pytest.mark.skipif(find() is None, reason="chromium is not installed: apt-get install chromium")
CHARTS = 13
LOSS = "document.querySelector('[data-chart=\"Loss\"]')"


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture
def file(make: Make, tmp_path: Path) -> Path:
    return write_page([make(prompts=NASTY, facts={"name": NASTY[0]})], tmp_path / "report.html")


def opened(page: Browser, file: Path, width: int, dark: bool = False) -> None:
    """Open the page; no error, no request but for the file itself, and nothing wider than the window."""
    page.errors.clear()
    page.requests.clear()
    page.open(file, width=width, dark=dark)
    assert page.errors == []
    assert [request for request in page.requests if not request.startswith("data:")] == [file.resolve().as_uri()]
    assert page.run("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_it_opens(page: Browser, file: Path, width: int, dark: bool) -> None:
    opened(page, file, width, dark)
    assert page.run("document.querySelectorAll('.chart canvas').length") == CHARTS
    assert page.run("charts.map(({plot}) => [plot.scales.x.min, plot.scales.x.max].join())") == ["10,300"] * CHARTS
    assert page.run("document.querySelector('[data-status]').textContent") == "done"
    assert page.run("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")


def test_details_of_training(page: Browser, file: Path) -> None:
    """Losses by t are smoothed over the lines that have them; groups are named; tokens stand under the throughput."""
    opened(page, file, 1400)
    labels = "charts.find(({spec}) => spec.title === '%s').spec.curves.map((each) => each.label)"
    times = [f"t {(level + 0.5) / 8:.2f}" for level in range(8)]
    assert page.run(labels % "Training loss by t") == page.run(labels % "Held-out loss by t") == times
    assert page.run(labels % "Gradient norm by group") == ["embed", "down up", "layers", "head"]
    assert page.run(labels % "Captions dropped") == ["value"]
    throughput = page.run("document.querySelector('[data-chart=\"Throughput\"] .note').textContent")
    assert throughput == "15,400 image tokens per second"


def test_a_run_of_an_older_version(page: Browser, tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURE, tmp_path / "tiny")
    opened(page, write_page([folder], tmp_path / "report.html"), 1400)
    titles = page.run("charts.map(({spec}) => spec.title)")
    assert "Loss" in titles
    assert not [title for title in titles if "by" in title or "aptions" in title]


@pytest.mark.parametrize("width", [390, 1400])
def test_captions_are_text(page: Browser, file: Path, width: int) -> None:
    opened(page, file, width)
    captions = page.run("[...document.querySelectorAll('.lapse + .shots figcaption')].map((each) => each.textContent)")
    assert captions == NASTY
    assert page.run("document.querySelectorAll('main script').length") == 0


def test_the_slider_moves(page: Browser, file: Path) -> None:
    opened(page, file, 1400)
    shown = "document.querySelector('.lapse output').textContent"
    image = "document.querySelector('.lapse + .shots img').src"
    newest = page.run(image)
    assert page.run(shown) == "step 20"
    page.run("document.querySelector('input.time').focus()")
    page.press("ArrowLeft")
    assert page.run(shown) == "step 10"
    assert page.run(image) != newest
    assert page.run("document.querySelector('input.time').getAttribute('aria-valuetext')") == "step 10"
    page.press("Home")
    assert page.run(shown) == "step 0"
    page.press("End")
    assert (page.run(shown), page.run(image)) == ("step 20", newest)


def test_the_sliders_of_several_runs_move_together(page: Browser, make: Make, tmp_path: Path) -> None:
    opened(page, write_page([make("one", steps=5), make("two", steps=3)], tmp_path / "both.html"), 1400)
    shown = "[...document.querySelectorAll('.lapse output')].map((each) => each.dataset.step)"
    assert page.run(shown) == ["40", "20"]
    page.run("document.querySelector('input.time').focus()")
    for key, expected in (("Home", ["0", "0"]), ("ArrowRight", ["10", "10"]), ("End", ["40", "20"])):
        page.press(key)
        assert page.run(shown) == expected


def test_play(page: Browser, file: Path) -> None:
    opened(page, file, 1400)
    state = "document.querySelector('.lapse').innerText.split(/\\s*\\n\\s*/).join(' ')"
    page.run("document.querySelector('.lapse button').click()")
    assert page.run(state) == "Pause step 0"
    page.run("new Promise((resolve) => setTimeout(resolve, 1800))")
    assert page.run(state) == "Play step 20"


@pytest.mark.parametrize("width", [390, 1400])
def test_hover_shows_a_value(page: Browser, file: Path, width: int) -> None:
    opened(page, file, width)
    page.run(f"{LOSS}.scrollIntoView({{behavior: 'instant', block: 'center'}})")
    box = page.run(
        f"(({{x, y, width, height}}) => [x, y, width, height])({LOSS}.querySelector('.u-over').getBoundingClientRect())"
    )
    values = f"[...{LOSS}.querySelectorAll('.u-value')].map((each) => each.textContent)"
    assert not any(any(char.isdigit() for char in value) for value in page.run(values))
    page.point_at(box[0] + box[2] / 2, box[1] + box[3] / 2)
    step, *losses = page.run(values)
    assert 100 <= float(step) <= 200
    assert all(1 < float(value) < 6 for value in losses)


def test_zoom_log_scale_and_smoothing(page: Browser, file: Path) -> None:
    opened(page, file, 1400)
    page.run("charts[0].plot.setScale('x', {min: 50, max: 100})")
    assert page.run("charts.map(({plot}) => [plot.scales.x.min, plot.scales.x.max].join())") == ["50,100"] * CHARTS
    page.run("document.getElementById('log').click()")
    assert page.run("charts[0].plot.scales.y.distr") == 3
    assert page.run("charts[0].plot.scales.x.max") == 100
    before = page.run("charts[0].plot.data[2][5]")
    page.run("(s => { s.value = 0; s.dispatchEvent(new Event('input')); })(document.getElementById('smoothing'))")
    assert page.run("charts[0].plot.data[2][5]") == page.run("charts[0].plot.data[1][5]") != before
    assert page.errors == []


def test_three_runs(page: Browser, make: Make, tmp_path: Path) -> None:
    folders = [make("one"), make("other", settings={"batch_size": 8})]
    folders += [make("a-name-without-any-space-" + "x" * 60, facts={"status": "diverged"})]
    file = write_page(folders, tmp_path / "both.html")
    opened(page, file, 390)
    opened(page, file, 1400)
    labels = f"[...{LOSS}.querySelectorAll('.u-label')].map((each) => each.textContent)"
    assert len(page.run(labels)) == 7
    assert "batch_size" in page.run("document.getElementById('differences').textContent")


def test_every_control_has_a_name(page: Browser, file: Path) -> None:
    opened(page, file, 1400)
    controls = "[...document.querySelectorAll('input, button, img, [role=img]')]"
    named = "each.textContent || each.alt || each.getAttribute('aria-label') || each.labels?.length"
    unnamed = f"{controls}.filter((each) => !({named})).map((each) => each.outerHTML)"
    assert page.run(unnamed) == []
    assert page.run("document.documentElement.lang") == "en"


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(page: Browser, file: Path, dark: bool) -> None:
    """WCAG AA: 4.5 for text on each background that it stands on."""
    opened(page, file, 1400, dark)
    script = """(() => {
      const light = (name) => { const c = css(name).slice(1).match(/../g).map((hex) => parseInt(hex, 16) / 255)
        .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
      const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
        return (x + 0.05) / (y + 0.05); };
      const texts = ['--ink', '--soft', '--accent', '--good', '--bad', '--warn'];
      const low = texts.flatMap((text) => ['--paper', '--card'].map((paper) => [text, paper, ratio(text, paper)]));
      low.push(['--ink', '--mark', ratio('--ink', '--mark')]);
      low.push(['--ink', '--warn-paper', ratio('--ink', '--warn-paper')]);
      return low.filter(([, , value]) => value < 4.5);
    })()"""
    assert page.run(script) == []


def test_a_row_for_each_source(page: Browser, make: Make, tmp_path: Path) -> None:
    row = {"path": "a/b", "images": 12, "trained": 9, "repeats": 2, "samples": 18, "weight": 1.0}
    sources = [{**row, "name": "few"}, {**row, "name": NASTY[0], "repeats": "balance", "weight": 0.5}]
    folder = make(facts={"data": {"images": 24, "epochs_per_image": 3.0, "sources": sources}})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("few", NASTY[0])
    for line in lines:
        prefix = "val/" if "val/loss" in line else ""
        line |= {f"{prefix}loss/{name}": line[f"{prefix}loss"] + number for number, name in enumerate(names)}
    lines[0].pop("loss/few")  # a step without a sample of it
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    opened(page, write_page([folder], tmp_path / "sources.html"), 390)
    labels = "charts.find(({spec}) => spec.title === '%s').spec.curves.map((each) => each.label)"
    for title in ("Training loss by source", "Held-out loss by source"):
        assert page.run(labels % title) == list(names)
    assert not page.run("charts.some(({spec}) => spec.title.startsWith('Loss/'))")
    cells = (
        "[...document.querySelectorAll('#data table tbody tr')].map((row) => [...row.cells].map((c) => c.textContent))"
    )
    few, nasty = page.run(cells)
    assert few[:6] == ["few", "12", "3", "2", "18", "1"]
    assert nasty[:6] == [NASTY[0], "12", "3", "balance", "18", "0.5"]
    assert [float(text) for text in few[6:]] == pytest.approx(
        [lines[1]["loss/few"], lines[-2]["loss/few"], lines[-1]["val/loss/few"]], rel=1e-3
    )
