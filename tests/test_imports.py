"""Who may know whom (ARCHITECTURE.md), and that help is instant."""

import ast
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import diffengine

ROOT = Path(diffengine.__file__).parent
FILES = {file.relative_to(ROOT).as_posix(): file for file in sorted(ROOT.rglob("*.py"))}
OUTSIDE_MODELS = [name for name in FILES if not name.startswith("models/")]


def imported(name):
    """Every module that a file imports, at its top or inside a function; for `from a import b` also a.b."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively: write the whole name"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def knows(name, *modules):
    """Which of these modules, or what is in them, a file imports."""
    return {each for each in imported(name) for module in modules if f"{each}.".startswith(f"{module}.")}


def inside(*folders):
    names = [name for name in FILES if name.startswith(folders)]
    assert names, f"no files in {folders}"
    return names


@pytest.mark.parametrize("name", inside("datasets/"))
def test_datasets_know_neither_models_nor_engine(name):
    assert knows(name, "diffengine.models", "diffengine.engine", "diffengine.export", "mmengine") == set()


@pytest.mark.parametrize("name", inside("models/"))
def test_models_know_neither_datasets_nor_engine(name):
    assert knows(name, "diffengine.datasets", "diffengine.engine", "diffengine.export", "mmengine") == set()


@pytest.mark.parametrize("name", OUTSIDE_MODELS)
def test_nobody_outside_knows_an_implementation(name):
    assert knows(name, "diffengine.models.amused", "diffengine.models.vq") == set()


@pytest.mark.parametrize("name", inside("models/"))
def test_implementations_do_not_know_one_another(name):
    own = ".".join(["diffengine", *Path(name).parts[:2]])
    others = {"diffengine.models.amused", "diffengine.models.vq"} - {own}
    assert knows(name, *others) == set()


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("engine/")])
def test_mmengine_is_known_in_engine_only(name):
    assert knows(name, "mmengine") == set()


@pytest.mark.parametrize("name", [name for name in FILES if name != "cli.py"])
def test_nobody_knows_the_commands_but_the_cli(name):
    assert knows(name, "diffengine.commands") == set()


def test_masking_knows_torch_only():
    known = {each.partition(".")[0] for each in imported("models/masking.py")} - sys.stdlib_module_names
    assert known == {"torch", "numpy", "diffengine"}
    assert knows("models/masking.py", "diffengine") == {
        "diffengine.errors",
        "diffengine.errors.UserError",
    }


def test_help_is_instant():
    program = (
        "import sys, diffengine, diffengine.cli as cli\n"
        "cli.parser().format_help()\n"
        "assert cli.main(['list-cfg']) == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'mmengine', 'datasets', 'numpy', 'PIL'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("file", sorted((ROOT.parent / "tools").glob("*.py")), ids=lambda file: file.name)
def test_bitsandbytes_is_silent_from_the_first_import_on(file):
    """Diffusers imports it, and it logs what it lacks at once."""
    names = [node for node in ast.parse(file.read_text(encoding="utf-8")).body
             if isinstance(node, ast.Import | ast.ImportFrom)]  # fmt: skip
    modules = [getattr(node, "module", None) or node.names[0].name for node in names]
    packages = [module.partition(".")[0] for module in modules]
    others = {"diffusers", "peft", "transformers", "torch", "emoji_demo"} & {*packages}
    assert all(packages.index("diffengine") < packages.index(name) for name in others)
    assert logging.getLogger("bitsandbytes").level == logging.ERROR
