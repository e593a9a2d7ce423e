"""The installed wheel holds the package and the configs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import diffengine
from diffengine import config

ROOT = Path(diffengine.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel of this checkout installed, without a package index."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    build = ["wheel", *offline, "--no-build-isolation", "--wheel-dir", folder / "built", ROOT]
    subprocess.run([*pip, *build], check=True)
    wheels = list((folder / "built").glob("diffengine-*.whl"))
    assert len(wheels) == 1
    subprocess.run([*pip, "install", *offline, "--target", folder / "site", *wheels], check=True)
    return folder / "site"


def run(installed, cwd, *argv):
    """The output of `python ARGV`, run in a folder where only the installed package can be imported."""
    return subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(installed)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_wheel_holds_the_configs(installed, tmp_path):
    output = run(installed, tmp_path, "-c", "from diffengine import config; print(*config.config_dirs())")
    assert output.split() == [str(installed / "diffengine" / "configs")]
    listed = run(installed, tmp_path, "-m", "diffengine", "list-cfg").splitlines()
    assert [line.split()[0] for line in listed] == list(config.shipped())
    run(installed, tmp_path, "-m", "diffengine", "copy-cfg", "amused_512_own", "deep/my.py")
    program = "from diffengine import config; print(config.read('deep/my.py') == config.read('amused_512_own'))"
    assert run(installed, tmp_path, "-c", program) == "True\n"


def test_wheel_holds_the_page(installed, tmp_path):
    names = {
        "page.html",
        "page.css",
        "page.js",
        "elements.js",
        "data.js",
        "uPlot.iife.min.js",
        "uPlot.min.css",
        "uPlot.LICENSE",
    }
    assert {path.name for path in (installed / "diffengine" / "report" / "static").iterdir()} == names
    (tmp_path / "metrics.jsonl").write_text('{"iter": 1, "loss": 2.0}\n')
    assert run(installed, tmp_path, "-m", "diffengine", "report", ".") == "wrote report.html\n"


def test_wheel_holds_only_the_package(installed):
    top_level = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert top_level == {"diffengine", "bin"}
    sources = {path.relative_to(ROOT) for path in (ROOT / "diffengine").rglob("*.py")}
    files = {path.relative_to(installed) for path in (installed / "diffengine").rglob("*.py")}
    configs = {Path("diffengine") / path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.py")}
    assert files == sources | configs
