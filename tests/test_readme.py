"""What the documents say is there: commands, configs, targets, files, versions."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from diffengine import cli, config
from diffengine.engine.build import load_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md", "configs/amused/README.md", "configs/emoji/README.md", "benchmarks/README.md",
    "ARCHITECTURE.md", "CHANGES.md",
]  # fmt: skip


def commands() -> list[str]:
    """Every indented `diffengine ...` line of the documents, without its comment and leading variables."""
    lines = [line for name in DOCUMENTS for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    found = [re.sub(r"^    (\w+=\S+ )*", "", line) for line in lines if re.match(r"    (\w+=\S+ )*diffengine ", line)]
    return list(dict.fromkeys(found))


def test_there_are_commands() -> None:
    assert len(commands()) >= 10


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_readme_parses(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    options = cli.parser().parse_args(words)
    if options.command in ("train", "copy-cfg") or (options.command == "convert" and options.checkpoint):
        name = options.name if options.command == "copy-cfg" else options.config
        changes = getattr(options, "cfg_options", [])
        _, resolved = load_config(name, changes)
        assert resolved["model"]["type"]


def test_the_missions_commands_stand_word_for_word() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in (
        "    diffengine train amused_512_pokemon_blip ",
        "    NPROC_PER_NODE=8 diffengine train amused_512_pokemon_blip ",
        "    diffengine convert amused_512_pokemon_blip work_dirs/amused_512_pokemon_blip/epoch_50.pth "
        "work_dirs/amused_512_pokemon_blip --save-keys transformer\n",
    ):
        assert line in text


def test_snippets_are_python(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 3
    ast.parse(snippets[1])
    (tmp_path / "mine.py").write_text(snippets[2], encoding="utf-8")
    _, resolved = load_config(str(tmp_path / "mine.py"))
    assert resolved["custom_hooks"] == [{"type": "diffengine.engine.hooks.EMAHook", "decay": 0.999}]
    assert resolved["model"]["adapters"]["transformer"]["r"] == 16
    assert (resolved["seed"], resolved["train_dataloader"]["num_workers"]) == (1, 2)
    imported = {
        alias.name
        for node in ast.walk(ast.parse(snippets[0]))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {"AmusedPipeline", "UVit2DModel"} <= imported


@pytest.mark.parametrize("name", DOCUMENTS)
def test_linked_files_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / name).parent / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake (\w+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_demo_converts_the_configs_last_checkpoint() -> None:
    last = f"iter_{config.read('amused_32_emoji')['max_iters']}.pth"
    for name in ("Makefile", "README.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert re.findall(r"amused_32_emoji/(iter_\d+\.pth)", text) == [last]


def test_every_config_is_in_the_table() -> None:
    tables = [ROOT / "README.md", *(ROOT / "configs").glob("*/README.md")]
    text = "".join(path.read_text(encoding="utf-8") for path in tables)
    for name in config.shipped():
        assert f"| `{name}` |" in text


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    wanted = [*project["dependencies"], *optional["8bit"], *optional["emoji"], *optional["test"]]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.split("==")[0].lower(): line.split("==")[1] for line in lines if "==" in line and line[0] != "#"}
    for requirement in wanted:
        name, bound = re.match(r"([\w-]+)(?:\[[\w,]+\])?(?:>=([\d.]+))?", requirement).groups()  # type: ignore[union-attr]
        if name != "diffengine":
            assert name.lower() in pins, name
            assert [int(part) for part in pins[name.lower()].split(".")] >= [int(part) for part in bound.split(".")]
