"""Config files: find them by name, extend, override, validate, resolve.

A config is a Python file. It opens with its everyday settings (`batch_size = 8`); below them are the sections
(`model = dict(type=AmusedModel, ...)`), which refer to a setting as "${batch_size}". A setting so stands in one
place, and changing it, by flag or in a file that extends this one, acts wherever it is used.

    extends = "amused_512_own"     # a shipped name, or a path from this file's folder
    resolution = 256               # replaces the setting
    model = dict(mask_schedule="linear")   # merges into the section; another `type` replaces it

Imports in a config are never executed when it is read (mmengine's lazy configs): a class becomes its dotted name,
and a loaded config is plain data.
"""

import ast
import difflib
import json
import pprint
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffengine.errors import UserError

# Sections without a `type` of their own, and what builds each: its signature is the section's vocabulary.
BUILDERS = {
    "train_dataloader": "diffengine.engine.assemble.build_dataloader",
    "optim_wrapper": "diffengine.engine.optim.build_optim_wrapper",
    "param_scheduler": "diffengine.engine.optim.build_param_scheduler",
    "train_cfg": "diffengine.engine.loop.StepLoop",
}
SECTIONS = {"model", "default_hooks", "custom_hooks", "vis_backends", *BUILDERS}
# What only a run knows, and passes when it builds a section: no option of a config.
GIVEN = {
    "model": {"assets", "seed"},
    "train_dataloader": {"model", "seed", "start_iter"},
    "optim_wrapper": {"model"},
    "param_scheduler": {"optimizer", "num_iters"},
    "train_cfg": {"runner", "dataloader"},
}
PLAIN = {"seed", "work_dir"}  # read by the engine as they are

_REFERENCE = re.compile(r"\$\{(\w+)\}")
Plain = dict[str, Any]


# ---------------------------------------------------------------------------------------------- finding


def config_dirs() -> list[Path]:
    """Where shipped configs lie: inside the wheel, or beside the package in a checkout or editable install."""
    package = Path(__file__).resolve().parent
    return [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]


def shipped() -> dict[str, Path]:
    """Every shipped config by name, sorted."""
    files = (file for folder in config_dirs() for file in folder.rglob("*.py") if "_base_" not in file.parts)
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


def find(name: str, beside: Path | None = None) -> Path:
    """The file of a shipped name, or of a path (relative to the folder `beside`, else to the current one).

    Raises:
        UserError: there is no such config; the nearest names are given.
    """
    path = Path(name).expanduser()
    if path.suffix == ".py":
        path = beside / path if beside else path
        if path.is_file():
            return path
        raise UserError(f"config file '{path}' does not exist; `diffengine list-cfg` lists the shipped ones")
    known = shipped()
    if name in known:
        return known[name]
    for folder in config_dirs():
        if (base := folder / "_base_" / f"{name}.py").is_file():
            return base
    raise UserError(f"unknown config '{name}'{_nearest(name, known)}; `diffengine list-cfg` lists them all")


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""


# ---------------------------------------------------------------------------------------------- reading


def read(name: str, beside: Path | None = None) -> Plain:
    """A config as plain data: what it extends merged in, references still unresolved."""
    path = find(name, beside)
    config = _read_file(path)
    bases = config.pop("extends", [])
    merged: Plain = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = merge(merged, read(base, path.parent))
    return merge(merged, config)


def _read_file(path: Path) -> Plain:
    from mmengine.config import Config
    from mmengine.config.utils import ConfigParsingError

    try:
        config, imported = Config._parse_lazy_import(str(path))
        return {key: _plain(value) for key, value in config.to_dict().items() if key not in imported}
    except UnicodeDecodeError as error:
        raise UserError(f"config '{path}' is not UTF-8 text: {error}") from error
    except SyntaxError as error:
        raise UserError(f"config '{path}' line {error.lineno}: {error.msg}") from error
    except (ConfigParsingError, ArithmeticError, AttributeError, LookupError, NameError, RuntimeError) as error:
        raise UserError(f"config '{path}': {type(error).__name__}: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"config '{path}' holds more than plain values and imported classes: {error}") from error


def _plain(value: Any) -> Any:
    """Plain data only (what JSON holds); tuples become lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"got {value!r} of {type(value).__name__}")


def merge(base: Plain, update: Mapping[str, Any]) -> Plain:
    """`update` over `base`: dicts merge, all else replaces; a dict that names another `type` replaces too."""
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        if both and value.get("type", old.get("type")) == old.get("type"):  # type: ignore[union-attr]
            merged[key] = merge(dict(old), value)  # type: ignore[arg-type]
        else:
            merged[key] = value
    return merged


# ---------------------------------------------------------------------------------------------- overriding


def override(config: Plain, options: Iterable[str]) -> Plain:
    """Apply `key=value` or `section.key=value`. A value is a Python literal, else a string, spaces kept.

    Raises:
        UserError: no '=', a path that does not exist, or a value of another type than the one it replaces.
    """
    config = json.loads(json.dumps(config))
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not key:
            raise UserError(f"--cfg-options got '{option}'; expected KEY=VALUE, as in batch_size=4")
        _assign(config, key.strip(), text)
    return config


def _assign(config: Plain, key: str, text: str) -> None:
    *parents, last = key.split(".")
    target: Any = config
    for depth, part in enumerate(parents):
        target = _child(target, part, ".".join(parents[: depth + 1]))
    if isinstance(target, Mapping) and last not in target and "type" not in target and target is config:
        raise UserError(f"--cfg-options: unknown key '{key}'{_nearest(last, target)}")
    if isinstance(target, list):
        _child(target, last, key)
    slot: Any = int(last) if isinstance(target, list) else last
    old = target[slot] if isinstance(target, list) or slot in target else None
    target[slot] = _literal(text, old, key)


def _child(target: Any, part: str, path: str) -> Any:
    if isinstance(target, list) and part.lstrip("-").isdigit() and -len(target) <= int(part) < len(target):
        return target[int(part)]
    if isinstance(target, Mapping) and part in target:
        return target[part]
    known = target if isinstance(target, Mapping) else []
    size = f", a list of {len(target)}" if isinstance(target, list) else ""
    raise UserError(f"--cfg-options: there is no '{path}' in this config{size}{_nearest(part, known)}")


def _literal(text: str, old: Any, key: str) -> Any:
    """`text` as the type that `old` has."""
    if isinstance(old, str) and not _REFERENCE.fullmatch(old) and text != "None":
        return text
    try:
        value = _plain(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError):
        value = text
    expected = type(old)
    same = isinstance(value, expected) and isinstance(value, bool) == isinstance(old, bool)
    widened = expected is float and isinstance(value, int) and not isinstance(value, bool)
    unknown = old is None or value is None or isinstance(old, str)
    if not (same or widened or unknown):
        raise UserError(
            f"{key} got {value!r} ({type(value).__name__}); expected {expected.__name__}, as in {key}={old!r}"
        )
    return float(value) if widened else value


# ---------------------------------------------------------------------------------------------- resolving


def resolve(config: Plain) -> Plain:
    """The config with every "${setting}" replaced by the setting's value.

    Raises:
        UserError: a reference to no setting, or a setting that nothing refers to, all in one error.
    """
    faults: list[str] = []
    used: set[str] = set()
    names = [key for key in config if key not in SECTIONS]

    def replace(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return {key: replace(item, f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [replace(item, f"{path}.{place}") for place, item in enumerate(value)]
        if not isinstance(value, str) or not _REFERENCE.search(value):
            return value
        wanted = _REFERENCE.findall(value)
        used.update(wanted)
        missing = [name for name in wanted if name not in names]
        faults.extend(f"{path} refers to setting '{name}'{_nearest(name, names)}" for name in missing)
        if missing:
            return value
        if whole := _REFERENCE.fullmatch(value):
            return config[whole[1]]
        return _REFERENCE.sub(lambda match: str(config[match[1]]), value)

    settings = {name: replace(config[name], name) for name in names}
    config = {**config, **settings}
    sections = {key: replace(value, key) for key, value in config.items() if key in SECTIONS}
    for name in names:
        if name not in used | PLAIN:
            others = [*used, *PLAIN, *SECTIONS]
            faults.append(f"unknown key '{name}'{_nearest(name, others)} (nothing in this config uses it)")
    _raise(faults)
    return {**settings, **sections}


def _raise(faults: list[str]) -> None:
    if faults:
        raise UserError("; ".join(["the config has " + faults[0], *faults[1:]]))


# ---------------------------------------------------------------------------------------------- validating


def validate(resolved: Plain) -> None:
    """Check every part of a resolved config against the signature of the class that it configures.

    Imports the classes, builds nothing, reads no weights.

    Raises:
        UserError: every unknown key (with the nearest), wrong type and missing value, in one error.
    """
    from diffengine.signatures import faults_of

    faults = [f"no section '{name}'" for name in ("model", "train_dataloader", "optim_wrapper", "train_cfg")
              if name not in resolved]
    for key, section in resolved.items():
        if key in SECTIONS:
            typed = {"type": BUILDERS[key], **section} if key in BUILDERS else section
            faults += faults_of(typed, key, GIVEN.get(key, set()))
    seed = resolved.get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        faults.append(f"seed got {seed!r}; expected an int of at least 0")
    _raise(faults)


def load(name: str, options: Iterable[str] = (), settings: Mapping[str, Any] | None = None) -> tuple[Plain, Plain]:
    """Read, apply the settings of flags and then `--cfg-options`, resolve, validate.

    Returns:
        The config as written (with references; it is what a run keeps) and as resolved.
    """
    config = read(name)
    for key, value in (settings or {}).items():
        if value is not None and key not in config and key not in PLAIN:
            known = ", ".join(name for name in config if name not in SECTIONS)
            raise UserError(f"config '{name}' has no setting '{key}'; it has {known}")
    config.update({key: value for key, value in (settings or {}).items() if value is not None})
    config = override(config, options)
    config.setdefault("seed", 0)
    resolved = resolve(config)
    validate(resolved)
    return config, resolved


# ---------------------------------------------------------------------------------------------- writing


def to_text(config: Plain, comment: str = "") -> str:
    """The config as a Python file that `diffengine train` reads again; settings first."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    ordered = sorted(config, key=lambda key: key in SECTIONS)
    lines += [f"{key} = {pprint.pformat(config[key], width=100, sort_dicts=False)}" for key in ordered]
    return "\n".join(lines) + "\n"
