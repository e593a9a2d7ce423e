"""Building the parts that a config names.

A config imports a class and writes `dict(type=Class, option=value, ...)`; once loaded, `type` is the class's
dotted name. Any importable class serves, so a stranger's data set or model needs no entry in a list here.
"""

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from diffengine.errors import UserError

EXTRAS = {"bitsandbytes": "8bit", "wandb": "wandb"}  # package -> the extra of ours that installs it


def import_from_here() -> None:
    """Let a config of the user's name modules in the current folder, as under `python -m`.

    For commands that were given a config: a checkpoint alone never makes the current folder importable.
    """
    if "" not in sys.path:
        sys.path.append("")


def resolve(type_name: str) -> Any:
    """The class or function that a dotted name stands for; UserError when there is none."""
    module, _, name = type_name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        extra = EXTRAS.get(type_name.partition(".")[0])
        check = "check the import at the top of the config, and that the package that holds it is installed"
        if extra and isinstance(error, ImportError):
            check = f"pip install 'diffengine[{extra}]'"
        raise UserError(f"type '{type_name}' cannot be imported ({error}): {check}") from error


def build(part: Any, **given: Any) -> Any:
    """Build `dict(type=..., ...)`, with `given` for what only the run knows; pass anything else through."""
    if not isinstance(part, Mapping) or "type" not in part:
        return part
    options = {key: value for key, value in part.items() if key != "type"}
    return resolve(part["type"])(**options, **given)
