"""The wheel, installed elsewhere, brings its configs with it."""

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
    """A folder that the wheel of this checkout is installed in; no index is asked."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    alone = ["--no-deps", "--no-index"]
    build = ["wheel", *alone, "--no-build-isolation", "--wheel-dir", folder / "built", ROOT]
    subprocess.run([*pip, *build], check=True)
    wheels = list((folder / "built").glob("diffengine-*.whl"))
    assert len(wheels) == 1
    subprocess.run([*pip, "install", *alone, "--target", folder / "site", *wheels], check=True)
    return folder / "site"


def run(installed, here, *argv):
    """`python ARGV` in another folder, where only the installed package can be meant."""
    return subprocess.run(
        [sys.executable, *argv],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(installed)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_configs_come_with_the_wheel(installed, tmp_path):
    where = run(installed, tmp_path, "-c", "from diffengine import config; print(*config.config_dirs())")
    assert where.split() == [str(installed / "diffengine" / "configs")]
    listed = run(installed, tmp_path, "-m", "diffengine", "list-cfg").splitlines()
    assert [line.split()[0] for line in listed] == list(config.shipped())
    run(installed, tmp_path, "-m", "diffengine", "copy-cfg", "amused_512_own", "deep/my.py")
    program = "from diffengine import config; print(config.read('deep/my.py') == config.read('amused_512_own'))"
    assert run(installed, tmp_path, "-c", program) == "True\n"


def test_the_wheel_holds_the_package_and_no_more(installed):
    tops = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"diffengine", "bin"}
    ours = {path.relative_to(ROOT) for path in (ROOT / "diffengine").rglob("*.py")}
    there = {path.relative_to(installed) for path in (installed / "diffengine").rglob("*.py")}
    configs = {Path("diffengine") / path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.py")}
    assert there == ours | configs
