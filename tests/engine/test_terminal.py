"""What a run shows on a terminal, and where there is none."""

import signal
import sys
from pathlib import Path

import pytest

from diffengine import terminal
from diffengine.engine.hooks import Hook, metrics
from diffengine.engine.run import Run
from diffengine.engine.step import Step
from diffengine.errors import UserError
from tests.engine import runs
from tests.engine.runs import Toy, signal_at, train
from tests.support.photos import write_photo_folder
from tests.support.terminal import use_terminal

CAPTION = "a [red]cat[/red] :smile: at [/home]"


class Says(Hook):
    """Prints and warns after step 2, and raises an error after step `fails_at`."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at

    def after_step(self, run: Run, step: Step) -> None:
        if run.clock.done == 2:
            print(CAPTION)
            run.warn(f"the caption is odd: {CAPTION}")
        if run.clock.done == self.fails_at:
            raise UserError("no [such] thing")


def says(**options: int) -> str:
    return f"custom_hooks=[{ {'type': 'tests.engine.test_terminal.Says', **options} }]"


def logged(work_dir: Path, data: Path) -> list[str]:
    """The lines of log.txt without the time, that on the data first, where it is printed."""
    lines = [line[len("2026-01-01 00:00:00 ") :] for line in (work_dir / "log.txt").read_text().splitlines()]
    summary = next(line for line in lines if line.startswith("10 images of 40x40"))
    return [f"{data}: {summary}", *(line for line in lines if line != summary)]


def is_metrics(line: str) -> bool:
    return line.startswith("step ") and " loss " in line


def test_a_live_line_below_plain_lines(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The screen has every line of the log except the metrics' lines after the first, and what is printed."""
    screen, work_dir = use_terminal(monkeypatch), tmp_path / "run [red]"
    monkeypatch.setattr(terminal, "REFRESH", 0)
    write_photo_folder(tmp_path / "held_out", 2, 40)
    settings = {"validation_data": str(tmp_path / "held_out"), "validation_every": 2, "preview_every": 2}
    path = toy.config("live", max_iters=4, log_every=1, prompts=["a cat"], cache=False, **settings)
    assert train(path, work_dir, "--cfg-options", says()) == 0
    lines, values = logged(work_dir, toy.data), runs.metrics(work_dir)
    first, *others = [line for line in lines if is_metrics(line)]
    assert [line.split()[1] for line in [first, *others]] == ["1/4", "2/4", "3/4", "4/4"]
    assert "(ln 64 = 4.159)" in first
    expected = [line for line in lines if line not in others]
    expected.insert(next(index for index, line in enumerate(lines) if line.startswith("warning")) - 1, CAPTION)
    assert screen.screen[:-1] == expected
    assert f"warning: the caption is odd: {CAPTION}" in expected
    assert any(line.startswith("memory: ") for line in expected)
    losses = {line["iter"]: line["loss"] for line in values if "loss" in line}
    held_out = {line["iter"]: line["val/loss"] for line in values if "val/loss" in line}
    assert screen.screen[-1].startswith("━━━")
    assert f" 4/4 loss {losses[4]:.4g} val {held_out[4]:.4g} 0:00 left " in screen.screen[-1]
    assert screen.screen[-1].endswith(" images/s")
    (frame, *_) = [frame for frame in screen.frames if f" 3/4 loss {losses[3]:.4g} val {held_out[2]:.4g} " in frame]
    assert frame.endswith(" images/s preview in 1")
    assert max(map(len, screen.frames)) <= 80
    assert screen.cursor_is_shown
    assert sys.stdout is screen


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [(says(fails_at=2), 2, "error: no [such] thing"), (signal_at(2, signal.SIGINT), 130, "stopped by SIGINT")],
    ids=["error", "interrupt"],
)
def test_the_terminal_is_given_back(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    option: str, code: int, message: str,
) -> None:  # fmt: skip
    screen = use_terminal(monkeypatch)
    path = toy.config("given_back", max_iters=4, log_every=4, cache=False)
    assert train(path, tmp_path, "--cfg-options", option) == code
    assert message in capsys.readouterr().err
    assert " 2/4 loss " in screen.screen[-1]
    assert screen.getvalue().count("\x1b[?25l") == 1
    assert screen.cursor_is_shown
    assert screen.getvalue().rstrip("\x1b[?25h").endswith("\n")
    assert sys.stdout is screen


@pytest.mark.parametrize("quiet", [60.0, 0.0])
def test_plain_lines_where_there_is_no_terminal(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, quiet: float
) -> None:
    """With `quiet` at 0, each step without a metrics' line says how far the run is, and only in the log."""
    monkeypatch.setattr(metrics, "QUIET", quiet)
    monkeypatch.setenv("FORCE_COLOR", "1")
    path = toy.config("plain", max_iters=6, log_every=3, cache=False)
    assert train(path, tmp_path, "--cfg-options", says()) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "\r" not in output
    printed = [line for line in output.splitlines() if line != CAPTION]
    assert printed == logged(tmp_path, toy.data)
    assert [line.split()[1] for line in printed if is_metrics(line)] == ["1/6", "3/6", "6/6"]
    assert [line["iter"] for line in runs.metrics(tmp_path)] == [1, 3, 6]
    paces = [line.split("  ") for line in printed if line.startswith("step ") and not is_metrics(line)]
    assert [line[0] for line in paces] == ([] if quiet else ["step 2/6", "step 4/6", "step 5/6"])
    assert all(left.endswith(" left") and rate.endswith(" images/s") for _, left, rate in paces)
