"""Checking a section of a config against the signature of the class that it configures."""

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from diffengine.errors import UserError
from diffengine.registry import resolve
from diffengine.text import did_you_mean


def children(value: Any) -> Iterable[tuple[Any, Any]]:
    """(key, item) of a dict, (index, item) of a list; none of another value."""
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()


def problems_of(section: Any, path: str, given: Set[str] = frozenset()) -> list[str]:
    """Every problem in a (nested) section of a resolved config: unknown keys, wrong types, missing values.

    `given` are the parameters that the run passes itself; an optimizer's `params` always is.
    """
    inherited = given if isinstance(section, list) else frozenset()
    nested = [problem for key, item in children(section) for problem in problems_of(item, f"{path}.{key}", inherited)]
    if not isinstance(section, Mapping) or "type" not in section:
        return nested
    if not isinstance(section["type"], str):
        return [f"{path}.type got {section['type']!r}; expected an imported class", *nested]
    try:
        target = resolve(section["type"])
    except UserError as error:
        return [f"{path}: {error}", *nested]
    return problems_against(target, section, path, {*given, "self", "params"}) + nested


def problems_against(target: Callable, section: Mapping[str, Any], path: str, given: Set[str]) -> list[str]:
    """The problems of one dict of options against a class or function; arguments as of `problems_of`."""
    name = getattr(target, "__name__", str(target))
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # a module, or written in C
        return [] if callable(target) else [f"{path}: type got {section['type']}; expected a class or a function"]
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # a third party's annotations that only a type checker can read
        hints = {}
    named = {key: item for key, item in parameters.items() if item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)}
    options = [key for key in named if key not in given]
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    problems = []
    for key, value in section.items():
        if key == "type" or (key not in options and open_ended):
            continue
        if key not in options:
            advice = did_you_mean(key, options) or f"; it takes {', '.join(options) or 'no options'}"
            problems.append(f"{path}: unknown key '{key}' for {name}{advice}")
        elif key in hints and not fits(value, hints[key]):
            expected = describe_hint(hints[key])
            problems.append(f"{path}.{key} got {value!r} ({type(value).__name__}); expected {expected}")
    missing = [key for key in options if named[key].default is inspect.Parameter.empty and key not in section]
    return problems + [f"{path}: {name} needs '{key}'" for key in missing]


def types_in(section: Any) -> list[str]:
    """The dotted names of the classes that a (nested) section names."""
    own = [str(section["type"])] if isinstance(section, Mapping) and "type" in section else []
    return own + [name for _, item in children(section) for name in types_in(item)]


def with_defaults(section: Any, known: Set[str]) -> Any:
    """A (nested) section of a resolved config with the defaults of the classes in `known`; no other is imported."""
    if isinstance(section, list):
        return [with_defaults(item, known) for item in section]
    if not isinstance(section, Mapping):
        return section
    nested = {key: with_defaults(item, known) for key, item in section.items()}
    return {**defaults_of(resolve(section["type"])), **nested} if str(section.get("type")) in known else nested


def defaults_of(target: Callable) -> dict[str, Any]:
    """The defaults of a class's options; lists for tuples, as in a config."""
    try:
        options = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # written in C
        return {}
    defaults = {option.name: option.default for option in options if option.default is not option.empty}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value satisfies an annotation; an annotation that is not known here admits everything."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if origin is typing.Literal:
        return value in inner
    if origin in (None, types.NoneType):
        return value is None
    if origin is float:
        return type(value) in (int, float)
    if origin in (int, str, bool):
        return type(value) is origin
    if origin is dict:
        return isinstance(value, Mapping)
    if getattr(origin, "__module__", "") == "torch":  # a Tensor, which a number may stand for: never plain
        return False
    if origin not in (list, tuple):
        return True
    if not isinstance(value, list):
        return False
    if len(inner) > 1 and inner[1] is not Ellipsis:  # tuple[X, Y], a list in a config
        return len(value) == len(inner) and all(map(fits, value, inner))
    return not inner or all(fits(item, inner[0]) for item in value)


def describe_hint(hint: Any) -> str:
    """An annotation in plain text: "int or None", "'cosine' or 'linear'"."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(describe_hint, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
