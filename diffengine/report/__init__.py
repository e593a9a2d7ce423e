"""The page of a run, of several, or of a data set: one HTML file."""

from diffengine.report.data import write_data_page
from diffengine.report.page import build_page, write_page
from diffengine.report.read import RunFiles, commands, read_run

__all__ = ["RunFiles", "build_page", "commands", "read_run", "write_data_page", "write_page"]
