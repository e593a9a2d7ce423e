"""The field's words: those that this project once used instead must not come back, in code, messages or documents."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What not to write, and what to write.
BANNED = {
    r"pictures?|picturing": "image",
    r"drawings?|drew": "image; generate, generated",
    r"(draws?|drawn) (an?|the|all|its|every|each|\d+|new|previews?|class|missing)? ?"
    r"(images?|prompts?|previews?|grids?|strips?|emoji|concepts?|combinations?)": "generate (random numbers are drawn)",
    r"forms?": "variation, or format",
    r"places?": "index, path, device or position",
    r"parts?": "section, component, chunk, shard or micro-batch",
    r"beside": "next to, with, besides; a temporary file",
    r"from nothing": "from scratch",
    r"anew": "again",
    r"faults?": "error, problem",
    r"rehears\w*": "dry run",
    r"stand-?ins?": "placeholder",
    r"gauges?": "extra metrics",
    r"spell\w*": "format",
    r"kinds?": "class, type",
    r"told|said": "reported, given",
    r"otherwise": "else, differently",
    r"what of": "subject, verb, object",
    r"as it is|of its own|in words": "leave it out",
}
# Names that configs, caches, checkpoints and metrics of version 0.1.0 hold, names of others, and idioms.
ALLOWED = re.compile(
    r"emoji_pictures|class_pictures|skipped_pictures|pictures\.arrow|\"pictures\"|'pictures'|pictures\.json"
    r"|class_drawing|drawn\.json|\"forms\"|made_of"
    r"|as long as it is|in[- _]place\b|\.parts\b|\.kind\b|segmentation fault|clean-up",
    re.IGNORECASE,
)
SUFFIXES = {".py", ".md", ".sh", ".toml"}
FOLDERS = ("benchmarks", "configs", "diffengine", "docs", "tests", "tools")


def texts() -> list[Path]:
    """Every text file of the project, except this one and what version 0.1.0 wrote."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    files += [*ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    return [path for path in files if path != Path(__file__) and "fixtures" not in path.parts]


def found(text: str) -> list[str]:
    """The banned words of a text, each with its line and what to write."""
    hits = []
    for number, line in enumerate(ALLOWED.sub("", text).splitlines(), start=1):
        for words, better in BANNED.items():
            hits += [
                f"line {number}: '{hit[0]}'; write {better}"
                for hit in re.finditer(rf"(?i)(?<![a-z])({words})(?![a-z])", line)
            ]
    return hits


@pytest.mark.parametrize("file", texts(), ids=lambda file: str(file.relative_to(ROOT)))
def test_words(file: Path) -> None:
    assert found(file.read_text(encoding="utf-8")) == []


def test_what_is_found() -> None:
    assert found("the picture's form; what of it? Told anew\nrequire_parts(") == [
        "line 1: 'picture'; write image",
        "line 1: 'form'; write variation, or format",
        "line 1: 'anew'; write again",
        "line 1: 'Told'; write reported, given",
        "line 1: 'what of'; write subject, verb, object",
        "line 2: 'parts'; write section, component, chunk, shard or micro-batch",
    ]
    assert found("pictures.arrow changes in place; inform the department, draw a number") == []
