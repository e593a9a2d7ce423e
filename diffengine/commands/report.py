"""Write the page of a run, report.html; with several work dirs, one page that compares them."""

import argparse
from pathlib import Path

from diffengine.errors import UserError, require
from diffengine.files import expanded, real_path
from diffengine.terminal import say


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work_dir", nargs="+", help="the folder of a run")
    default = "default: report.html in the work dir or, for several, in the current folder"
    parser.add_argument("-o", "--output", metavar="FILE", help=f"the .html file to write; {default}")


def run(options: argparse.Namespace) -> int:
    from diffengine.report import write_page

    folders = [expanded(folder) for folder in options.work_dir]
    distinct = {real_path(folder) for folder in folders}
    require(len(distinct) == len(folders), "report got the same work dir twice; name each once")
    file = Path(options.output) if options.output else (folders[0] if len(folders) == 1 else Path()) / "report.html"
    require(file.suffix in (".html", ".htm"), f"--output got '{file}'; expected a file name that ends in .html")
    require(not file.is_dir(), f"--output got '{file}', which is a folder; expected a file")
    try:
        write_page(folders, file)
    except FileNotFoundError as error:
        raise UserError(f"cannot write '{file}': {error.strerror}; make its folder first") from error
    say(f"wrote {file}")
    return 0
