"""What the documents say is there: commands, configs, targets, files, versions."""

import ast
import inspect
import re
import shlex
import tomllib
from functools import partial, reduce
from pathlib import Path
from typing import Any

import pytest

import diffengine
from diffengine import cli, config
from diffengine.engine.build import BUILDERS, load_config
from diffengine.registry import resolve
from tests.engine.runs import Toy

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "configs/*/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)


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
        if name.endswith(".py"):
            return  # the reader's own, or a run's
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


def snippets(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_snippets_are_python(name: str) -> None:
    for snippet in snippets(name):
        ast.parse(snippet)


def test_the_missions_snippet() -> None:
    imported = {
        alias.name
        for node in ast.walk(ast.parse(snippets("README.md")[0]))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {"AmusedPipeline", "UVit2DModel"} <= imported


def test_the_config_of_docs_resolves(tmp_path: Path) -> None:
    mine, backends = snippets("docs/configs.md")
    (tmp_path / "mine.py").write_text(mine, encoding="utf-8")
    (tmp_path / "watched.py").write_text(f'extends = "mine.py"\n{backends}', encoding="utf-8")
    _, resolved = load_config(str(tmp_path / "watched.py"))
    assert resolved["custom_hooks"] == [{"type": "diffengine.engine.hooks.EMAHook", "decay": 0.999}]
    assert resolved["model"]["adapters"]["transformer"]["r"] == 16
    assert (resolved["seed"], resolved["model"]["mask_schedule"]) == (1, "linear")
    assert [backend["type"].rpartition(".")[2] for backend in resolved["vis_backends"]] == [
        "TensorboardBackend", "WandbBackend",
    ]  # fmt: skip


def test_the_options_of_docs_exist_with_their_defaults() -> None:
    """The rows of docs/configs.md: an option's path and its default."""
    text = (ROOT / "docs/configs.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z_]+\.[\w.]+)` \| `([^`]+)` \|", text, flags=re.MULTILINE)
    assert len(rows) == 6
    for path, default in rows:
        _, resolved = load_config("amused_512_own", [f"{path}={default}"])
        *sections, name = path.split(".")
        section = reduce(dict.__getitem__, sections, resolved)
        target = BUILDERS.get(path.partition(".")[0]) if len(sections) == 1 else None
        options = inspect.signature(target or resolve(section["type"])).parameters
        assert options[name].default == ast.literal_eval(default)


def test_the_adapter_of_docs_resolves(tmp_path: Path) -> None:
    (tmp_path / "lokr.py").write_text(snippets("docs/recipes.md")[0], encoding="utf-8")
    _, resolved = load_config(str(tmp_path / "lokr.py"))
    assert resolved["model"]["adapters"]["transformer"]["type"] == "peft.LoKrConfig"


def test_from_python(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's lines, on a small model: what they name is there and does what they say."""
    small = {"pretrained": toy.model, "resolution": 32, "max_iters": 1, "num_workers": 0, "prompts": []}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffengine, "train", partial(diffengine.train, **small), raising=False)
    program = snippets("README.md")[1].replace('"FOLDER"', repr(str(toy.data)))
    space: dict[str, Any] = {}
    exec(program.replace('snow")', 'snow", num_inference_steps=1)'), space)
    run = space["run"]
    assert [line["iter"] for line in run.metrics] == [0, 1, 1]  # validated before and after the step
    assert run.work_dir == tmp_path / "work_dirs/amused_512_own_lora"
    assert run.checkpoints == [run.work_dir / "iter_1.pth"]
    assert run.config["batch_size"] == 4
    assert type(space["pipe"]).__name__ == "AmusedPipeline"
    assert Path("dog.png").stat().st_size > 0


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
    extras = [requirement for name in ("8bit", "emoji", "optimizers", "test") for requirement in optional[name]]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.split("==")[0].lower(): line.split("==")[1] for line in lines if "==" in line and line[0] != "#"}
    for requirement in [*project["dependencies"], *extras]:
        name, bound = re.match(r"([\w-]+)(?:\[[\w,]+\])?(?:>=([\d.]+))?", requirement).groups()  # type: ignore[union-attr]
        if name != "diffengine":
            assert name.lower() in pins, name
            ours, lowest = ([int(number) for number in version.split(".")] for version in (pins[name.lower()], bound))
            assert ours >= lowest
