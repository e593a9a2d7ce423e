"""Who may import whom (ARCHITECTURE.md), and that help is instant. A dotted name in a string counts as an import."""

import ast
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffengine

ROOT = Path(diffengine.__file__).parent
FILES = {file.relative_to(ROOT).as_posix(): file for file in sorted(ROOT.rglob("*.py"))}
# The floors from the bottom up: a room imports only from floors below it, and from itself.
FLOORS = [
    {"__init__", "config", "distributed", "errors", "files", "grids", "registry", "signatures", "text"},
    {"datasets", "models"},
    {"cache", "export"},
    {"engine"},
    {"api"},
    {"commands"},
    {"__main__", "cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
DOTTED = re.compile(r"diffengine(?:\.\w+)+")
# The package's own names for what it imports on first use.
LAZY = {("__init__.py", "diffengine.api")}


def imported(name: str) -> set[str]:
    """Every module that a file imports or names in a string; for `from a import b` also a.b."""
    found: set[str] = set()
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively: write the whole name"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found |= set(DOTTED.findall(node.value))
    return found


def knows(name: str, *modules: str) -> set[str]:
    """Which of these modules, or what is in them, a file imports."""
    return {each for each in imported(name) for module in modules if f"{each}.".startswith(f"{module}.")}


def room_of(module: str) -> str:
    """ "datasets" of "datasets/base.py" or "diffengine.datasets.base"."""
    parts = Path(module).with_suffix("").parts if "/" in module or module.endswith(".py") else module.split(".")[1:]
    return parts[0] if parts else "__init__"


def test_every_file_has_a_floor() -> None:
    assert {room_of(name) for name in FILES} == set(FLOOR)


@pytest.mark.parametrize("name", FILES)
def test_no_room_reaches_up(name: str) -> None:
    own = room_of(name)
    for module in imported(name):
        if module.partition(".")[0] != "diffengine" or (name, module) in LAZY:
            continue
        room = room_of(module)
        if room in FLOOR and room != own:  # other names are the package's attributes, such as __version__
            assert FLOOR[room] <= FLOOR[own], f"{name} imports {module}"
            assert {room, own} != {"datasets", "models"}, f"{name} imports {module}"


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("models/")])
def test_nobody_outside_knows_an_implementation(name: str) -> None:
    assert knows(name, "diffengine.models.amused", "diffengine.models.vq") == set()


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("models/amused/", "models/vq/"))])
def test_implementations_do_not_know_one_another(name: str) -> None:
    own = ".".join(["diffengine", *Path(name).parts[:2]])
    others = {"diffengine.models.amused", "diffengine.models.vq"} - {own}
    assert knows(name, *others) == set()


@pytest.mark.parametrize("name", [name for name in FILES if name != "engine/mmengine_seam.py"])
def test_mmengine_is_known_in_one_file(name: str) -> None:
    assert knows(name, "mmengine") == set()


def test_masking_knows_torch_only() -> None:
    known = {each.partition(".")[0] for each in imported("models/masking.py")} - sys.stdlib_module_names
    assert known == {"torch", "numpy", "diffengine"}
    assert {".".join(each.split(".")[:2]) for each in knows("models/masking.py", "diffengine")} == {"diffengine.errors"}


def test_import_and_help_are_instant() -> None:
    program = (
        "import sys, diffengine, diffengine.cli as cli\n"
        "cli.parser().format_help()\n"
        "assert cli.main(['list-cfg']) == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'mmengine', 'datasets', 'numpy', 'PIL'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("file", sorted((ROOT.parent / "tools").glob("*.py")), ids=lambda file: file.name)
def test_bitsandbytes_is_silent_from_the_first_import_on(file: Path) -> None:
    """Diffusers imports it, and it logs what it lacks at once."""
    names = [node for node in ast.parse(file.read_text(encoding="utf-8")).body
             if isinstance(node, ast.Import | ast.ImportFrom)]  # fmt: skip
    modules = [getattr(node, "module", None) or node.names[0].name for node in names]
    packages = [module.partition(".")[0] for module in modules]
    others = {"diffusers", "peft", "transformers", "torch", "emoji_demo"} & {*packages}
    assert all(packages.index("diffengine") < packages.index(name) for name in others)
    assert logging.getLogger("bitsandbytes").level == logging.ERROR
