"""Holding a part of a config against the signature of the class that it configures."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from diffengine.errors import UserError
from diffengine.registry import resolve
from diffengine.text import did_you_mean


def problems_of(part: Any, path: str, given: Set[str] = frozenset()) -> list[str]:
    """Every problem in a (nested) part of a resolved config: unknown keys, wrong types, missing values.

    `given` names the parameters that the run passes itself; an optimizer's `params` always is.
    """
    if isinstance(part, list):
        parts = [(item, f"{path}.{index}") for index, item in enumerate(part)]
        return [problem for item, index in parts for problem in problems_of(item, index, given)]
    if not isinstance(part, Mapping):
        return []
    nested = [problem for key, item in part.items() for problem in problems_of(item, f"{path}.{key}")]
    if "type" not in part:
        return nested
    if not isinstance(part["type"], str):
        return [f"{path}.type got {part['type']!r}; expected an imported class", *nested]
    try:
        target = resolve(part["type"])
    except UserError as error:
        return [f"{path}: {error}", *nested]
    return _against(target, part, path, {*given, "self", "params"}) + nested


def _against(target: Callable, part: Mapping[str, Any], path: str, given: Set[str]) -> list[str]:
    name = getattr(target, "__name__", str(target))
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # a module, or written in C
        return [] if callable(target) else [f"{path}: type got {part['type']}; expected a class or a function"]
    many = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = {key: parameter for key, parameter in parameters.items() if parameter.kind not in many}
    options = [key for key in named if key not in given]
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    hints = _hints(target)
    problems = []
    for key, value in part.items():
        if key == "type":
            continue
        if key not in options:
            if not open_ended:
                problems.append(f"{path}: unknown key '{key}' for {name}{_suggest(key, options)}")
        elif key in hints and not fits(value, hints[key]):
            kind = type(value).__name__
            problems.append(f"{path}.{key} got {value!r} ({kind}); expected {_spell(hints[key])}")
    missing = [key for key in options if named[key].default is inspect.Parameter.empty and key not in part]
    return problems + [f"{path}: {name} needs '{key}'" for key in missing]


def kinds_in(part: Any) -> list[str]:
    """The dotted names of the classes that a (nested) part names."""
    if isinstance(part, Mapping):
        own = [str(part["type"])] if "type" in part else []
        return own + [name for value in part.values() for name in kinds_in(value)]
    return [name for item in part for name in kinds_in(item)] if isinstance(part, list) else []


def with_defaults(part: Any, known: Set[str]) -> Any:
    """A (nested) part of a resolved config with the options that it leaves to its class.

    Only of classes in `known`; no other is imported.
    """
    if isinstance(part, list):
        return [with_defaults(item, known) for item in part]
    if not isinstance(part, Mapping):
        return part
    nested = {key: with_defaults(item, known) for key, item in part.items()}
    return {**defaults_of(resolve(part["type"])), **nested} if str(part.get("type")) in known else nested


def defaults_of(target: Callable) -> dict[str, Any]:
    """What a class takes where an option is not given; lists for tuples, as in a config."""
    try:
        options = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # written in C
        return {}
    defaults = {option.name: option.default for option in options if option.default is not option.empty}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}


def _suggest(key: str, options: Sequence[str]) -> str:
    known = f"; it takes {', '.join(options)}" if options else "; it takes no options"
    return did_you_mean(key, options) or known


def _hints(target: Callable) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # a third party's annotations that only a type checker can read
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value can be what the annotation says; an annotation not known here admits all."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if origin is typing.Literal:
        return value in inner
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (int, str, bool):
        return type(value) is hint
    if origin in (list, tuple) or hint in (list, tuple):
        return isinstance(value, list) and _items_fit(value, inner)
    if origin is dict or hint is dict:
        return isinstance(value, Mapping)
    return True


def _items_fit(values: list, inner: tuple) -> bool:
    """Whether a list holds what `list[X]`, `tuple[X, ...]` or `tuple[X, Y]` says (lists, in a config)."""
    if len(inner) > 1 and inner[1] is not Ellipsis:
        return len(values) == len(inner) and all(map(fits, values, inner))
    return not inner or all(fits(value, inner[0]) for value in values)


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_spell, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(option) for option in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
