"""Holding a part of a config against the signature of the class that it configures."""

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Set
from typing import Any

from diffengine.errors import UserError
from diffengine.registry import resolve

def faults_of(part: Any, path: str, given: Set[str] = frozenset()) -> list[str]:
    """Every fault in a (nested) part of a resolved config: unknown keys, wrong types, missing values.

    `given` names the parameters that the run passes itself; an optimizer's `params` always is.
    """
    if isinstance(part, list):
        return [fault for place, item in enumerate(part) for fault in faults_of(item, f"{path}.{place}")]
    if not isinstance(part, Mapping):
        return []
    nested = [fault for key, item in part.items() if key != "type" for fault in faults_of(item, f"{path}.{key}")]
    if not isinstance(part.get("type"), str):
        return nested
    try:
        target = resolve(part["type"])
    except UserError as error:
        return [f"{path}: {error}"]
    return _against(target, part, path, {*given, "self", "params"}) + nested


def _against(target: Callable, part: Mapping[str, Any], path: str, given: Set[str]) -> list[str]:
    parameters = inspect.signature(target).parameters
    name = getattr(target, "__name__", str(target))
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    options = [key for key in parameters if key not in given]
    hints = _hints(target)
    faults = []
    for key, value in part.items():
        if key == "type":
            continue
        if key not in options:
            if not open_ended:
                close = difflib.get_close_matches(key, options, n=1, cutoff=0.4)
                hint = f"did you mean '{close[0]}'?" if close else f"it takes {', '.join(options)}"
                faults.append(f"{path}: unknown key '{key}' for {name}; {hint}")
        elif key in hints and not fits(value, hints[key]):
            faults.append(f"{path}.{key} got {value!r} ({type(value).__name__}); expected {_spell(hints[key])}")
    missing = [
        key
        for key in options
        if parameters[key].default is inspect.Parameter.empty
        and parameters[key].kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        and key not in part
    ]
    return faults + [f"{path}: {name} needs '{key}'" for key in missing]


def _hints(target: Callable) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # a third party's annotations that only a type checker can read
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value can be what the annotation says; an annotation not known here admits all."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (int, str, bool):
        return type(value) is hint
    if origin in (list, tuple) or hint in (list, tuple):
        return isinstance(value, list)
    if origin is dict or hint is dict:
        return isinstance(value, Mapping)
    return True


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(option) for option in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
