"""The live line and progress, on a terminal and where there is none."""

import ast
import io
import logging
import sys
from pathlib import Path

import pytest

from diffengine import terminal
from diffengine.errors import UserError
from diffengine.terminal import ConsoleHandler, LineFormatter, LiveLine, Progress, fitting, say
from diffengine.text import LONGEST_MESSAGE, one_line, printable, shown
from tests.support.terminal import STYLE, Terminal, use_terminal

NUMBERS = ["400/600", "loss 3.123", "val 3.456", "12:34 left", "105 images/s", "preview in 20"]


def live_line(seconds: float = 0.0) -> LiveLine:
    return LiveLine(lambda: (2 / 3, NUMBERS), lambda: print("a plain line"), seconds)


@pytest.mark.parametrize(
    ("columns", "bar", "numbers"),
    [(200, 40, 6), (120, 40, 6), (80, 11, 6), (71, 0, 6), (60, 5, 5), (43, 0, 4), (20, 0, 2), (6, 0, 1)],
)
def test_what_fits_is_shown(monkeypatch: pytest.MonkeyPatch, columns: int, bar: int, numbers: int) -> None:
    """All numbers come before the bar, and the most important number before others."""
    screen = use_terminal(monkeypatch, columns)
    live_line().close()
    (line,) = screen.screen
    text = " ".join(NUMBERS[:numbers])[: columns - 2]
    assert line.count("━") + line.count("╸") + line.count("╺") == bar
    assert line.lstrip("━╸╺ ") == text
    assert len(line) <= columns - 2


def test_a_console_that_was_closed_gets_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    console = io.StringIO()
    console.close()
    monkeypatch.setattr(sys, "stdout", console)
    ConsoleHandler().handle(logging.makeLogRecord({"msg": "step 1"}))
    assert capsys.readouterr().err == ""


def test_fitting() -> None:
    assert fitting(["12/60", "loss 1"], 12) == "12/60 loss 1"
    assert fitting(["12/60", "loss 1"], 11) == "12/60"
    assert fitting(["12/60", "loss 1"], 3) == "12/"
    assert fitting(["12/60", "loss 1"], -1) == ""


def test_other_lines_stay_above_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = use_terminal(monkeypatch)
    errors = Terminal()
    monkeypatch.setattr(sys, "stderr", errors)
    line = live_line()
    print("a [red]cat[/red] :smile: 'quoted' 123 " + "word " * 30)
    print("a warning", file=sys.stderr)
    line.tick()
    print("not a", end=" [line]", flush=True)
    line.close()
    assert screen.screen[:-1] == ["a [red]cat[/red] :smile: 'quoted' 123 " + "word " * 30, "a warning", "not a [line]"]
    assert screen.screen[-1].endswith(" ".join(NUMBERS))
    assert all(not STYLE.search(text) for text in screen.getvalue().splitlines() if "━" not in text)
    assert screen.cursor_is_shown
    assert sys.stdout is screen
    assert (sys.stderr, errors.getvalue()) == (errors, "")


def test_errors_that_go_to_a_file_still_do(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = use_terminal(monkeypatch)
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    line = live_line()
    print("a warning", file=sys.stderr)
    line.close()
    assert file.getvalue() == "a warning\n"
    assert "warning" not in screen.text


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color(monkeypatch: pytest.MonkeyPatch, no_color: bool) -> None:
    screen = use_terminal(monkeypatch)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    live_line().close()
    codes = {code for style in STYLE.findall(screen.getvalue()) for code in style[2:-1].split(";")}
    assert (codes <= {"0", "2"}) == no_color  # 2: dim, which is no colour


def test_it_is_rewritten_when_it_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = use_terminal(monkeypatch)
    line = live_line()
    shown = len(screen.frames)
    for _ in range(100):
        line.tick()
    assert len(screen.frames) <= shown + 1
    monkeypatch.setattr(terminal, "REFRESH", 0)
    shown = len(screen.frames)
    line.tick()
    line.wrote_line()
    assert len(screen.frames) == shown + 2
    line.close()


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_line_a_while_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    """With FORCE_COLOR too, which is set where nobody can see a line being rewritten."""
    screen = use_terminal(monkeypatch) if term == "dumb" else io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")
    line = live_line(seconds=3600)
    assert not line.live
    line.tick()
    assert screen.getvalue() == ""
    line = live_line(seconds=0)
    line.tick()
    assert screen.getvalue() == "a plain line\n"
    line.close()
    assert screen.getvalue() == "a plain line\n"


def test_another_line_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    line = live_line(seconds=60)
    for now[0] in (30, 59, 61, 90, 122):
        if now[0] == 59:
            line.wrote_line()
        line.tick()
    assert sys.stdout.getvalue() == "a plain line\n"  # 60 s after the other line, and not again 60 s after the first


def test_a_terminal_that_is_closed_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = use_terminal(monkeypatch)
    monkeypatch.setattr(terminal, "REFRESH", 0)
    line = live_line(seconds=3600)

    def fail(text: str) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(screen, "write", fail)
    line.tick()
    assert not line.live
    assert sys.stdout is screen
    line.tick()
    line.close()


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = use_terminal(monkeypatch)
    monkeypatch.setattr(terminal, "REFRESH", 0)
    with Progress(1200, "encoded", "images", steps=2) as progress:
        progress.skip(400)
        for _ in range(2):
            progress.advance(1000)
    assert len(screen.screen) == 1
    assert "━ encoded 500/1,000 images " in "".join(screen.frames)
    assert "━ encoded 1,000/1,000 images " in screen.screen[0]
    assert screen.screen[0].endswith("/s 0:00 left")
    assert screen.cursor_is_shown


def test_progress_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = use_terminal(monkeypatch)

    def fail() -> None:
        with Progress(2, "encoded", "images") as progress:
            progress.advance(1)
            raise UserError("no space")

    with pytest.raises(UserError, match="no space"):
        fail()
    assert "━ encoded 1/2 images " in screen.screen[-1]
    assert screen.cursor_is_shown
    assert sys.stdout is screen


def test_progress_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    now = [0.0]
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: now[0])
    with Progress(2000, "encoded", "images") as progress:
        for now[0] in (1, 5, 9, 11, 12, 20):
            progress.advance(200)
    assert capsys.readouterr().out == "encoded 800/2,000 images, 72.7/s, 0:16 left\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a cat, 猫 🐱 👩\u200d🚀 é", "a cat, 猫 🐱 👩\u200d🚀 é"),
        ("\x1b[2J\x07\r\b", r"\x1b[2J\x07\r\x08"),
        ("a\nb\tc\u2028d\x85", r"a\nb\tc\u2028d\x85"),
        ("\u202egpj.exe\u2066", r"\u202egpj.exe\u2066"),
        ("\udcff\0", r"\udcff\x00"),
    ],
)
def test_control_characters_are_shown_and_not_obeyed(
    text: str, shown: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """In what is printed, in the log on the console and in the file, and in errors."""
    say(text, "next")
    assert capsys.readouterr().out == f"{shown}\nnext\n"
    logger = logging.Logger("a run's")
    file = logging.FileHandler(tmp_path / "log.txt", encoding="utf-8")
    for handler in (ConsoleHandler(), file):
        handler.setFormatter(LineFormatter("%(message)s"))
        logger.addHandler(handler)
    logger.info("step %s", text)
    file.close()
    assert capsys.readouterr().out == f"step {shown}\n"
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == f"step {shown}\n"
    assert one_line(UserError(text)) == printable(" ".join(text.split()))


def test_a_message_is_cut_in_the_middle() -> None:
    assert one_line(UserError("got " + "x" * 10_000 + "; expected less")).endswith("x; expected less")
    assert len(one_line("x" * 10_000)) == LONGEST_MESSAGE + 3
    assert shown(list(range(10_000)))[:10] == "[0, 1, 2, "


def test_all_lines_are_printed_here() -> None:
    """`print` sends a terminal whatever a file name or a prompt holds."""
    package = Path(terminal.__file__).parent
    printing = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == ["terminal.py"]
