"""The page of a run, or of several: one HTML file, made from the files in their work dirs."""

from diffengine.report.page import build_page, write_page
from diffengine.report.read import RunFiles, commands, read_run

__all__ = ["RunFiles", "build_page", "commands", "read_run", "write_page"]
