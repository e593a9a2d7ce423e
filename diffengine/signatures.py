"""Checking a section of a config against the signature of the class that it configures."""

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

from diffengine.errors import UserError
from diffengine.registry import resolve
from diffengine.text import did_you_mean, shown

PLAIN = (bool, int, float, str, list, tuple, Sequence, dict, Mapping, typing.Literal)  # what a config can hold


@dataclass(frozen=True)
class Between:
    """The range of a number, in its annotation: `Annotated[int, Between(1, 100)]`."""

    least: float
    most: float

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        return f"from {self.least:,} to {self.most:,}"


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
        return [f"{path}.type got {shown(section['type'])}; expected an imported class", *nested]
    try:
        target = resolve(section["type"])
    except UserError as error:
        return [f"{path}: {error}", *nested]
    return problems_against(target, section, path, {*given, "self", "params"}) + nested


def options_of(target: Callable, given: Set[str] = frozenset()) -> set[str]:
    """The names of the options of a class or function, without those that are `given`; none if it is written in C."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return set()
    named = {item.name for item in parameters if item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)}
    return named - {"self", "params"} - given


def problems_against(target: Callable, section: Mapping[str, Any], path: str, given: Set[str]) -> list[str]:
    """The problems of one dict of options against a class or function; arguments as of `problems_of`."""
    name = getattr(target, "__name__", str(target))
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # a module, or written in C
        return [] if callable(target) else [f"{path}: type got {section['type']}; expected a class or a function"]
    hints = _hints(target)
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
        elif key in hints and not fits(value, hints[key]) and not _is(value, named[key].default):
            expected = describe_hint(hints[key])
            problems.append(f"{path}.{key} got {shown(value)} ({type(value).__name__}); expected {expected}")
    missing = [key for key in options if named[key].default is inspect.Parameter.empty and key not in section]
    return problems + [f"{path}: {name} needs '{key}'" for key in missing]


def _hints(target: Callable) -> dict[str, Any]:
    """The annotations of the parameters; none if they are a third party's that only a type checker can read."""
    # A dataclass's `__init__` has them too, but not the names of the module that they are to be read in.
    annotated = target if is_dataclass(target) or not inspect.isclass(target) else target.__init__
    try:
        return typing.get_type_hints(annotated, include_extras=True)
    except (NameError, TypeError):
        return {}


def _is(value: Any, default: Any) -> bool:
    """Whether a value is the default, which need not satisfy its annotation: `eps: float = None`."""
    return type(value) is type(default) and value == default


def sizes_out_of_range(name: str, sizes: Mapping[str, Any]) -> list[str]:
    """A message for each size of a network from scratch that no network has; it would take all memory or time."""
    problems = []
    for key, value in sizes.items():
        limit = Between(0, 1000 if "layers" in key or "blocks" in key else 2**20)
        numbers = [number for number in (value if isinstance(value, list) else [value]) if type(number) is int]
        if not all(number in limit for number in numbers):
            problems.append(f"{name}.{key} got {shown(value)}; expected {limit}")
    return problems


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


def fits(value: Any, hint: Any, alone: bool = True) -> bool:
    """Whether a plain value satisfies an annotation.

    A class that no config can hold admits everything if it is `alone`, without a plain type to choose instead: `Tensor`
    may convert a text, `float | Tensor` would have it a number.
    """
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        alone = not any((typing.get_origin(option) or option) in PLAIN for option in inner)
        return any(fits(value, option, alone) for option in inner)
    if origin is typing.Annotated:
        return fits(value, inner[0]) and all(value in limit for limit in inner[1:] if isinstance(limit, Between))
    if origin is typing.Literal:
        return any(value == option and type(value) is type(option) for option in inner)
    if origin in (None, types.NoneType):
        return value is None
    if origin is float:
        return type(value) in (int, float)
    if origin in (int, str, bool):
        return type(value) is origin
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(fits(item, hint) for item in value.values() for hint in inner[1:])
    if origin in (list, tuple, Sequence):
        return isinstance(value, list) and _items_fit(value, origin, inner)
    return alone or not isinstance(origin, type) or _may_become(value, origin)


def _may_become(value: Any, cls: type) -> bool:
    """Whether something of a class is built from a plain value, by us or by who takes it."""
    if isinstance(value, Mapping):
        return "type" in value or issubclass(cls, Mapping)
    if isinstance(value, list):
        return cls.__module__ in ("builtins", "collections.abc") and issubclass(cls, Iterable)
    return issubclass(cls, PurePath | Enum) if isinstance(value, str) else isinstance(value, cls)


def _items_fit(items: list, origin: type, hints: tuple) -> bool:
    """Whether the items of a list satisfy the annotations within the brackets of the list's or tuple's."""
    if origin is tuple and len(hints) > 1 and hints[1] is not Ellipsis:
        return len(items) == len(hints) and all(map(fits, items, hints))
    return not hints or all(fits(item, hints[0]) for item in items)


def describe_hint(hint: Any) -> str:
    """An annotation in plain text: "int or None", "'cosine' or 'linear'"."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(describe_hint, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Annotated:
        return " ".join([describe_hint(typing.get_args(hint)[0]), *map(str, hint.__metadata__)])
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
