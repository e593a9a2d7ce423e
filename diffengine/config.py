"""Config files: find them by name, extend, override, resolve, validate.

A config is a Python file. It opens with its everyday settings (`batch_size = 8`); below them are the sections
(`model = dict(type=AmusedModel, ...)`), which refer to a setting as "${batch_size}". So a setting has one value, and
changing it, by flag or in a file that extends this one, acts wherever it is used.

    extends = "amused_512_own"     # a shipped name, or a path from this file's folder
    resolution = 256               # replaces the setting
    model = dict(mask_schedule="linear")   # merges into the section; another `type` replaces it

Reading a config imports nothing: an imported class becomes its dotted name, and a loaded config is plain data.
"""

import ast
import builtins
import fnmatch
import inspect
import itertools
import json
import math
import os
import pprint
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffengine.errors import UserError, require
from diffengine.files import real_path
from diffengine.registry import resolve as resolve_type
from diffengine.signatures import children, options_of, problems_against, problems_of
from diffengine.text import can_be_written, did_you_mean, shown, where

Plain = dict[str, Any]
Builders = Mapping[str, Callable]  # what builds a section that names no class, by section

SECTIONS = {
    "model", "train_dataloader", "token_cache", "optim_wrapper", "param_scheduler", "train_cfg", "default_hooks",
    "custom_hooks", "vis_backends",
}  # fmt: skip
NEEDED = ("model", "train_dataloader", "optim_wrapper", "train_cfg")
LISTS = ("custom_hooks", "vis_backends")
GIVEN = {"model": {"assets", "seed"}, "vis_backends": {"save_dir"}}  # what the run passes: no options of a config
# The dicts that must name the class that they configure.
TYPED = (
    "model", "default_hooks.*", "custom_hooks.*", "vis_backends.*", "optim_wrapper.optimizer",
    "train_dataloader.dataset", "train_dataloader.image_transforms.*", "train_dataloader.transforms.*",
)  # fmt: skip
PLAIN = {"seed": 0, "work_dir": None}  # settings that the engine reads itself, with their defaults
# No config needs more: beyond these one is a mistake, and would take all memory or time.
LARGEST_FILE, MOST_VALUES, LONGEST_TEXT, DEEPEST, LONGEST_CHAIN = 10**6, 10**5, 10**5, 30, 30
LARGEST_SIDE = 2**14  # pixels of an image's side
REFERENCE = re.compile(r"\$\{(\w+)\}")


def check_side(option: str, side: int) -> None:
    """Refuse an image's side that no model has; it would take all memory."""
    require(side <= LARGEST_SIDE, f"{option} got {side:,}; expected {LARGEST_SIDE:,} pixels at most")


def config_dirs() -> list[Path]:
    """The folders of shipped configs: inside the wheel, or next to the package in a checkout."""
    package = Path(__file__).resolve().parent
    return [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]


def shipped() -> dict[str, Path]:
    """Every shipped config by name, sorted."""
    files = (file for folder in config_dirs() for file in folder.rglob("*.py") if "_base_" not in file.parts)
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


def find(name: str, folder: Path | None = None) -> Path:
    """The file of a shipped name, or of a path relative to `folder` (default: the current one)."""
    path = Path(os.path.expanduser(name))
    if path.suffix == ".py":
        path = folder / path if folder else path
        require(
            path.is_file(),
            f"config file '{path}' does not exist, or is no file; `diffengine list-cfg` lists the shipped ones",
        )
        return path
    known = shipped()
    files = {file.stem: file for configs in config_dirs() for file in configs.glob("_base_/*.py")} | known
    require(name in files, f"unknown config '{name}'{did_you_mean(name, known)}; `diffengine list-cfg` lists them all")
    return files[name]


class Imported:
    """What a config imports: its dotted name, and nothing else."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> "Imported":
        if name.startswith("__"):
            raise AttributeError(name)
        return Imported(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"'{self._name}' is only a name here and cannot be called: write dict(type=...)")


def read(name: str) -> Plain:
    """A config as plain data: what it extends merged in, references unresolved; its own keys first."""
    return _read(find(name), [])


def _read(path: Path, chain: list[Path]) -> Plain:
    """`read` of a file; `chain` holds the files that extend it, to find a loop."""
    require(real_path(path) not in chain, f"config '{path}' extends itself, by way of {', '.join(map(str, chain))}")
    require(len(chain) < LONGEST_CHAIN, f"config '{path}' is extended by a chain of {len(chain)} files; name fewer")
    config = _read_file(path)
    bases = config.pop("extends", [])
    merged: Plain = {}
    for base in bases if isinstance(bases, list) else [bases]:
        require(isinstance(base, str), f"config '{path}': extends got {shown(base)}; expected a config's name or path")
        merged = extend(merged, _read(find(base, path.parent), [*chain, real_path(path)]))
    return extend(merged, config)


def _read_file(path: Path) -> Plain:
    """What one file defines. It runs as Python, but what it imports are names only."""

    def import_name(name: str, space: Any = None, local: Any = None, wanted: Any = None, level: int = 0) -> Imported:
        if level or (wanted and "*" in wanted):
            raise ImportError('imports here are names of classes only; to build on another config: extends = "NAME"')
        return Imported(name if wanted else name.partition(".")[0])

    size = path.stat().st_size
    require(size <= LARGEST_FILE, f"config '{path}' has {size:,} bytes; expected Python, {LARGEST_FILE:,} at most")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8-sig"), str(path))
        space: Plain = {"__builtins__": {**vars(builtins), "__import__": import_name}}
        exec(compile(tree, str(path), "exec"), space)
    except KeyboardInterrupt:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"config '{path}' is not UTF-8 text: {error}") from error
    except SyntaxError as error:
        raise UserError(f"config '{path}' line {error.lineno or 1}: {error.msg}") from error
    except BaseException as error:  # a file may raise anything, and it is the user's
        raise UserError(f"config '{path}' {where(error, str(path))}") from error
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names}
    own = {key: value for key, value in space.items() if key not in names and not key.startswith("_")}
    return plain(own, f"config '{path}'")


def plain(value: Any, source: str) -> Any:
    """Plain data only (what JSON can hold); tuples become lists, and imported classes their dotted names."""
    count = itertools.count(1)

    def copied(value: Any, depth: int) -> Any:
        if depth > DEEPEST:
            raise UserError(f"{source} holds values more than {DEEPEST} levels deep, or one that holds itself")
        if next(count) > MOST_VALUES:
            raise UserError(f"{source} holds more than {MOST_VALUES:,} values")
        if isinstance(value, Imported):
            return value._name
        if isinstance(value, Path):  # from Python: data=Path("photos")
            value = str(value)
        if isinstance(value, Mapping):
            return {copied(str(key), depth): copied(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copied(item, depth + 1) for item in value]
        if problem := _no_plain_value(value):
            raise UserError(f"{source} {problem}: got {shown(value)} of {type(value).__name__}")
        return value

    return copied(value, 0)


def _no_plain_value(value: Any) -> str | None:
    """What keeps a single value out of a config; None if it can be in one."""
    if isinstance(value, str):
        short = len(value) <= LONGEST_TEXT
        problem = "holds text that is no UTF-8, or has NUL" if short else f"holds more than {LONGEST_TEXT:,} characters"
        return None if short and can_be_written(value) else problem
    if isinstance(value, int):
        return None if abs(value) < 2**63 else "holds an integer of more than 64 bits"
    if value is None or (isinstance(value, float) and math.isfinite(value)):
        return None
    return "holds more than plain values and imported classes"


def extend(base: Plain, update: Plain) -> Plain:
    """A config over the one that it extends: settings replace, sections merge; the keys of `update` come first."""
    settings = {key: value for key, value in update.items() if key not in SECTIONS}
    merged = merge({**base, **settings}, update)
    return {key: merged[key] for key in dict.fromkeys([*update, *merged])}


def merge(base: Plain, update: Plain) -> Plain:
    """`update` over `base`: dicts merge, all else replaces; a dict that names another `type` replaces too."""
    merged = dict(base)
    for key, value in update.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("type", old.get("type")) == old.get("type"):
            value = merge(old, value)
        merged[key] = value
    return merged


def override(config: Plain, options: Iterable[str], builders: Builders = MappingProxyType({})) -> Plain:
    """Apply `key=value` or `section.key=value`. A value is a Python literal, else a string, spaces kept.

    A key that is no setting, but an option of one section, is set there: `skip_unreadable=True`.
    """
    config = json.loads(json.dumps(config))
    for option in options:
        key, equals, text = option.partition("=")
        key = key.strip()
        require(bool(equals and key), f"--cfg-options got {shown(option)}; expected KEY=VALUE, as in batch_size=4")
        text = plain(text, f"--cfg-options: {key}")
        if "." not in key and key not in {*config, *SECTIONS, *PLAIN}:
            key = _path_of_option(config, key, builders)
        *parents, last = key.split(".")
        target: Any = config
        for depth, name in enumerate(parents):
            target = _child(target, name, ".".join(parents[: depth + 1]))
        if isinstance(target, dict):
            target[last] = _literal(text, target.get(last), key)
        else:
            target[int(last)] = _literal(text, _child(target, last, key), key)  # an item of a list must exist
    return config


def _path_of_option(config: Plain, name: str, builders: Builders) -> str:
    """The path of the one option of this name in the config's sections; a missing section is added.

    An option that refers to a setting is set by the setting alone.
    """
    found = list(_options_in(config, builders))
    paths = [path for path, value in found if path.rpartition(".")[2] == name and not _refers(value)]
    require(len(paths) <= 1, f"--cfg-options: '{name}' is an option of several sections; set one: {', '.join(paths)}")
    if paths:
        config.setdefault(paths[0].partition(".")[0], {})
        return paths[0]
    setting = next((value for path, value in found if path.rpartition(".")[2] == name), None)
    names = {*config, *SECTIONS, *PLAIN, *(path.rpartition(".")[2] for path, value in found if not _refers(value))}
    hint = f"; did you mean '{REFERENCE.findall(setting)[0]}'?" if setting else did_you_mean(name, names)
    raise UserError(f"--cfg-options: unknown key '{name}'{hint}")


def _refers(value: Any) -> bool:
    return isinstance(value, str) and REFERENCE.search(value) is not None


def _options_in(config: Plain, builders: Builders) -> Iterator[tuple[str, Any]]:
    """The path and value (None: unset) of each option of the sections' classes and of the dicts in them."""

    def of_section(section: Any, path: str, given: Set[str]) -> Iterator[tuple[str, Any]]:
        target = builders.get(path)
        if target is None and isinstance(section, dict) and isinstance(section.get("type"), str):
            with suppress(UserError):  # a class that cannot be imported is reported when the config is checked
                target = resolve_type(section["type"])
        if target is not None and isinstance(section, dict):
            yield from ((f"{path}.{name}", section.get(name)) for name in sorted(options_of(target, given)))
        for key, item in children(section):
            yield from of_section(item, f"{path}.{key}", frozenset() if isinstance(section, dict) else given)

    for name in sorted({*SECTIONS & config.keys(), *builders}):
        yield from of_section(config.get(name, {}), name, _given(name, builders))


def _given(section: str, builders: Builders) -> Set[str]:
    """What the run itself passes to a section: no options of a config."""
    parameters = inspect.signature(builders[section]).parameters.values() if section in builders else ()
    return {item.name for item in parameters if item.kind is item.KEYWORD_ONLY} | GIVEN.get(section, set())


def _child(target: Any, name: str, path: str) -> Any:
    """An item of a dict or list; `path` is where it should be in the config."""
    if isinstance(target, list) and re.fullmatch("-?[0-9]{1,9}", name) and -len(target) <= int(name) < len(target):
        return target[int(name)]
    if isinstance(target, dict) and name in target:
        return target[name]
    detail = did_you_mean(name, target) if isinstance(target, dict) else f"; its parent is {shown(target)}"
    raise UserError(f"--cfg-options: there is no '{path}' in this config{detail}")


def _literal(text: str, old: Any, key: str) -> Any:
    """`text` as a value of `old`'s type, if both are single values."""
    if isinstance(old, str) and not REFERENCE.fullmatch(old) and text not in ("None", "True", "False"):
        return text
    try:
        value = plain(ast.literal_eval(text), key)
    except (UserError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    if type(old) is float and type(value) is int:
        return float(value)
    if type(old) in (bool, int, float) and type(value) in (bool, int, float, str) and type(value) is not type(old):
        expected = f"expected {type(old).__name__}, as in {key}={shown(old)}"
        raise UserError(f"--cfg-options: {key} got {shown(value)} ({type(value).__name__}); {expected}")
    return value


def resolve(config: Plain) -> Plain:
    """The config with every "${setting}" replaced; one UserError lists wrong references and unused settings."""
    resolved, problems = _resolved(config)
    _raise(_unused(config, config) + problems)
    return resolved


def substitute(config: Plain) -> Plain:
    """Like `resolve`, but settings may be unused, and a reference to no setting stays."""
    return _resolved(config)[0]


def _resolved(config: Plain) -> tuple[Plain, list[str]]:
    """The resolved config, and what could not be resolved."""
    problems: list[str] = []
    settings = [key for key in config if key not in SECTIONS]

    count = itertools.count(1)

    def replace(value: Any, path: str, chain: tuple[str, ...]) -> Any:
        if next(count) > MOST_VALUES:
            raise UserError(f"{path} refers to more than {MOST_VALUES:,} values")
        if isinstance(value, dict):
            return {key: replace(item, f"{path}.{key}", chain) for key, item in value.items()}
        if isinstance(value, list):
            return [replace(item, f"{path}.{index}", chain) for index, item in enumerate(value)]
        names = dict.fromkeys(REFERENCE.findall(value)) if isinstance(value, str) else {}
        values = {}
        for name in names:
            if name not in settings:
                hint = did_you_mean(name, settings)
                problems.append(f"{path} refers to setting '{name}', which does not exist{hint}")
            elif name in chain:
                problems.append(f"{path} refers to '{name}', which refers back to itself")
            else:
                values[name] = replace(config[name], name, (*chain, name))
        if not names or len(values) < len(names):
            return value
        if whole := REFERENCE.fullmatch(value):
            return values[whole[1]]
        text = REFERENCE.sub(lambda match: str(values[match[1]]), value)
        require(len(text) <= LONGEST_TEXT, f"{path} refers to more than {LONGEST_TEXT:,} characters")
        return text

    resolved = {key: replace(value, key, (key,)) for key, value in config.items()}
    return resolved, list(dict.fromkeys(problems))


def _used(config: Plain) -> set[str]:
    """The settings that a section refers to, directly or by way of other settings."""
    used: set[str] = set()
    waiting = [value for key, value in config.items() if key in SECTIONS or key in PLAIN]
    while waiting:
        value = waiting.pop()
        new = set(REFERENCE.findall(value)) - used if isinstance(value, str) else set()
        used |= new
        waiting += [config[name] for name in new if name in config] + [item for _, item in children(value)]
    return used


def _unused(config: Plain, names: Iterable[str]) -> list[str]:
    """A message for each of these settings that acts nowhere in the config."""
    known = [*_used(config), *PLAIN, *SECTIONS]
    unused = [name for name in names if name not in known]
    return [f"unknown setting '{name}'{did_you_mean(name, known)} (nothing in this config uses it)" for name in unused]


def _raise(problems: list[str]) -> None:
    if problems:
        raise UserError("the config has errors: " + "; ".join(dict.fromkeys(problems)))


def validate(resolved: Plain, builders: Builders) -> list[str]:
    """The problems of a resolved config, by the signatures of the classes that it configures.

    Imports the classes, but builds nothing. The keyword-only parameters of builders are passed by the run.
    """
    problems = [f"no section '{name}'" for name in NEEDED if name not in resolved]
    for key in [key for key in resolved if key in SECTIONS]:
        section, expected = resolved[key], "list" if key in LISTS else "dict"
        if type(section).__name__ != expected:
            problems.append(f"section '{key}' got {shown(section)}; expected a {expected}")
        elif key in builders and "type" in section:
            problems.append(
                f"section '{key}' got type={shown(section['type'])}; expected none, since diffengine builds it"
            )
        else:
            if key in builders:
                problems += problems_against(builders[key], section, key, _given(key, builders))
            problems += problems_of(section, key, GIVEN.get(key, set())) + _untyped(section, key)
            if key == "optim_wrapper":
                problems += _group_problems(section)
    seed, work_dir = resolved.get("seed", PLAIN["seed"]), resolved.get("work_dir")
    if type(seed) is not int or not 0 <= seed < 2**32:
        problems.append(f"seed got {shown(seed)}; expected an int from 0 to 2**32 - 1")
    if not isinstance(work_dir, str | None):
        problems.append(f"work_dir got {shown(work_dir)}; expected a folder")
    return problems


def _group_problems(section: Plain) -> list[str]:
    """The problems of an `optim_wrapper`'s `param_groups`: a pattern each, and options of the optimizer's class."""
    problems, entries, optimizer = [], section.get("param_groups"), section.get("optimizer")
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        path = f"optim_wrapper.param_groups.{index}"
        if not isinstance(entry, dict) or type(entry.get("match")) is not str or "type" in entry:
            problems.append(f'{path} got {shown(entry)}; expected dict(match="text_encoder.*", lr=1e-5), no `type`')
        elif isinstance(optimizer, dict):
            merged = {**optimizer, **{key: value for key, value in entry.items() if key != "match"}}
            known = problems_of(optimizer, path)
            problems += [problem for problem in problems_of(merged, path) if problem not in known]
    return problems


def _untyped(value: Any, path: str) -> list[str]:
    """A message for each value in a section that must name a class and names none."""
    if any(fnmatch.fnmatchcase(path, pattern) and path.count(".") == pattern.count(".") for pattern in TYPED):
        off = value is None and path.startswith("default_hooks.")  # None switches a hook off
        named = isinstance(value, dict) and "type" in value
        return [] if off or named else [f"{path} got {shown(value)}; expected dict(type=...) that names a class"]
    return [problem for key, item in children(value) for problem in _untyped(item, f"{path}.{key}")]


def load(name: str, options: Iterable[str], settings: Mapping | None, builders: Builders) -> tuple[Plain, Plain]:
    """Read a config, apply settings and then `--cfg-options`: (as written, which a run keeps, and as resolved).

    A setting that acts nowhere is a mistake of whoever wrote it, in the file or by a flag. One that is inherited, or
    that an override put out of use, is dropped. One UserError lists all that is wrong.

    Args:
        options: `key=value`, as of `override`.
        settings: values by name; None changes nothing. A section merges.
    """
    config, problems = _written(name, list(options), settings, builders)
    used = _used(config) | PLAIN.keys() | SECTIONS
    config = {key: value for key, value in config.items() if key in used}
    resolved, unresolved = _resolved(config)
    _raise(problems + (unresolved or validate(resolved, builders)))
    return config, resolved


def unchecked(name: str, options: Iterable[str], settings: Mapping | None) -> Plain:
    """A config as `load` resolves it, unchecked: a first look at it imports no class.

    Raises:
        UserError: it cannot be read; or an option is one of a section that diffengine builds, which only `load` finds.
    """
    return substitute(_written(name, list(options), settings, MappingProxyType({}))[0])


def _written(name: str, options: list[str], settings: Mapping | None, builders: Builders) -> tuple[Plain, list[str]]:
    """The config with settings and options applied, and the problems of those that act nowhere."""
    config = extend(PLAIN, read(name))
    problems = _unused(config, [key for key in _read_file(find(name)) if key != "extends"])
    given = plain({key: value for key, value in (settings or {}).items() if value is not None}, f"config '{name}'")
    takes = ", ".join(key for key in config if key not in SECTIONS)
    for key in given:
        require(key in {*config, *SECTIONS}, f"config '{name}' has no setting '{key}'; it has {takes}")
    merged = extend(config, given)
    config = override({key: merged[key] for key in dict.fromkeys([*config, *merged])}, options, builders)
    changed = [*given, *(option.partition("=")[0].strip() for option in options)]
    return config, problems + _unused(config, [key for key in changed if key in config])


def to_text(config: Plain, comment: str = "") -> str:
    """The config as a Python file that `diffengine train` reads again; settings first."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    ordered = sorted(config, key=lambda key: key in SECTIONS)
    lines += [f"{key} = {pprint.pformat(config[key], width=100, sort_dicts=False)}" for key in ordered]
    return "\n".join(lines) + "\n"
