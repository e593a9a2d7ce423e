"""Building the parts that a config names.

A config imports a class and writes `dict(type=Class, option=value, ...)`; once loaded, `type` is the class's
dotted name. Any importable class serves, so a stranger's data set or model needs no entry in a list here.
"""

from collections.abc import Mapping
from typing import Any

from mmengine.registry import Registry

from diffengine.errors import UserError

PARTS = Registry("part", scope="diffengine")


def resolve(type_name: str) -> Any:
    """The class or function that a dotted name stands for; UserError when there is none."""
    try:
        return PARTS.get(type_name)
    except RuntimeError as error:
        raise UserError(
            f"type '{type_name}' cannot be imported: check the import at the top of the config, and that the "
            "package that holds it is installed"
        ) from error


def build(part: Any, **given: Any) -> Any:
    """Build `dict(type=..., ...)`, with `given` for what only the run knows; anything else is passed through."""
    if not isinstance(part, Mapping) or "type" not in part:
        return part
    options = {key: value for key, value in part.items() if key != "type"}
    return resolve(part["type"])(**options, **given)
