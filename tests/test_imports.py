"""The import rules of ARCHITECTURE.md, and a fast --help. A dotted name in a string counts as an import."""

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
# Layers from the bottom up. A package imports from its own layer and from those below.
LAYERS = [
    {
        "__init__",
        "config",
        "distributed",
        "errors",
        "files",
        "fonts",
        "grids",
        "registry",
        "signatures",
        "terminal",
        "text",
    },
    {"datasets", "models"},
    {"cache", "evaluation", "export", "report"},
    {"engine"},
    {"api"},
    {"commands"},
    {"__main__", "cli"},
]
LAYER_OF = {package: number for number, packages in enumerate(LAYERS) for package in packages}
DOTTED = re.compile(r"diffengine(?:\.\w+)+")
# Imported on first use.
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


def imported_from(name: str, *modules: str) -> set[str]:
    """The imports of a file from these modules."""
    return {each for each in imported(name) for module in modules if f"{each}.".startswith(f"{module}.")}


def package_of(module: str) -> str:
    """The package of a file or module: "datasets" for "datasets/base.py" and "diffengine.datasets.base"."""
    names = Path(module).with_suffix("").parts if "/" in module or module.endswith(".py") else module.split(".")[1:]
    return names[0] if names else "__init__"


def test_every_file_has_a_layer() -> None:
    assert {package_of(name) for name in FILES} == set(LAYER_OF)


@pytest.mark.parametrize("name", FILES)
def test_no_import_from_a_higher_layer(name: str) -> None:
    own = package_of(name)
    for module in imported(name):
        if module.partition(".")[0] != "diffengine" or (name, module) in LAZY:
            continue
        package = package_of(module)
        if package in LAYER_OF and package != own:  # other names are attributes of the package, such as __version__
            assert LAYER_OF[package] <= LAYER_OF[own], f"{name} imports {module}"
            assert {package, own} != {"datasets", "models"}, f"{name} imports {module}"


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("models/")])
def test_only_models_imports_an_implementation(name: str) -> None:
    assert imported_from(name, "diffengine.models.amused", "diffengine.models.vq") == set()


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("models/amused/", "models/vq/"))])
def test_implementations_do_not_import_each_other(name: str) -> None:
    own = ".".join(["diffengine", *Path(name).parts[:2]])
    others = {"diffengine.models.amused", "diffengine.models.vq"} - {own}
    assert imported_from(name, *others) == set()


@pytest.mark.parametrize("name", [name for name in FILES if name != "engine/mmengine_seam.py"])
def test_one_file_imports_mmengine(name: str) -> None:
    assert imported_from(name, "mmengine") == set()


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("report/")])
def test_the_page_reads_files_only(name: str) -> None:
    own = {package_of(each) for each in imported_from(name, "diffengine")} - {"report"}
    assert own <= LAYERS[0] | {"__version__"}
    assert imported_from(name, "torch", "diffusers", "numpy") == set()


def test_masking_imports_only_torch_and_numpy() -> None:
    packages = {each.partition(".")[0] for each in imported("models/masking.py")} - sys.stdlib_module_names
    assert packages == {"torch", "numpy", "diffengine"}
    own = imported_from("models/masking.py", "diffengine")
    assert {".".join(each.split(".")[:2]) for each in own} == {"diffengine.errors"}


def test_import_and_help_load_no_heavy_package() -> None:
    program = (
        "import sys, diffengine, diffengine.cli as cli\n"
        "cli.parser().format_help()\n"
        "assert cli.main(['list-cfg']) == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'mmengine', 'datasets', 'numpy', 'PIL', 'rich'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("file", sorted((ROOT.parent / "tools").glob("*.py")), ids=lambda file: file.name)
def test_tools_import_diffengine_first(file: Path) -> None:
    """diffengine silences bitsandbytes, which logs what it lacks as soon as diffusers imports it."""
    names = [node for node in ast.parse(file.read_text(encoding="utf-8")).body
             if isinstance(node, ast.Import | ast.ImportFrom)]  # fmt: skip
    modules = [getattr(node, "module", None) or node.names[0].name for node in names]
    packages = [module.partition(".")[0] for module in modules]
    others = {"diffusers", "peft", "transformers", "torch"} & {*packages}
    assert all(packages.index("diffengine") < packages.index(name) for name in others)
    assert logging.getLogger("bitsandbytes").level == logging.ERROR
