"""A terminal that keeps what is written to it, and the lines that it shows."""

import io
import re

import pytest

STYLE = re.compile(r"\x1b\[[0-9;]*m")
ERASE = "\r\x1b[2K"  # back to the first column, and erase the line
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor


class Terminal(io.StringIO):
    """What a terminal of 80 columns gets."""

    def isatty(self) -> bool:
        return True

    @property
    def _lines(self) -> list[str]:
        return self.text.removesuffix("\n").split("\n")

    @property
    def text(self) -> str:
        """Everything, without styles and the cursor's switches."""
        return STYLE.sub("", self.getvalue()).replace(HIDE, "").replace(SHOW, "")

    @property
    def screen(self) -> list[str]:
        """The lines that are seen, if the window is tall and wide enough."""
        return [line.rpartition(ERASE)[2] for line in self._lines]

    @property
    def frames(self) -> list[str]:
        """Every state of a line that was rewritten."""
        return [frame for line in self._lines for frame in line.split(ERASE) if "━" in frame]

    @property
    def cursor_is_shown(self) -> bool:
        text = self.getvalue()
        return HIDE in text and text.rfind(SHOW) > text.rfind(HIDE)


def use_terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 80) -> Terminal:
    """Make `sys.stdout` a terminal."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    return terminal
