"""From the names in a config to objects.

A config imports a class and writes `dict(type=Class, option=value, ...)`; once loaded, `type` is the class's dotted
name. Any importable class works, so your own data set or model needs no entry in a list here.
"""

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from diffengine.errors import UserError
from diffengine.text import one_line, shown, where

# package -> the extra of ours that installs it
EXTRAS = {"bitsandbytes": "8bit", "schedulefree": "optimizers", "prodigyopt": "optimizers", "wandb": "wandb"}


def import_from_here() -> None:
    """Let a config that the user named import from the current folder; a checkpoint alone never may."""
    if "" not in sys.path:
        sys.path.append("")


def resolve(type_name: str) -> Any:
    """The class or function of a dotted name; a UserError if it cannot be imported."""
    module, _, name = type_name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may raise anything
        extra = EXTRAS.get(type_name.partition(".")[0]) if isinstance(error, ImportError) else None
        check = "check the import at the top of the config, and that the package that holds it is installed"
        advice = f"pip install 'diffengine[{extra}]'" if extra else check
        why = one_line(error) if isinstance(error, ImportError | AttributeError) else where(error)
        raise UserError(f"type '{type_name}' cannot be imported ({why}): {advice}") from error


def build(section: Any, **given: Any) -> Any:
    """Build `dict(type=..., ...)`, with `given` for what only the run knows; return anything else unchanged."""
    if not isinstance(section, Mapping) or "type" not in section:
        return section
    options = {key: value for key, value in section.items() if key != "type"}
    cls = resolve(section["type"])
    try:
        return cls(**options, **given)
    except (UserError, OSError, MemoryError):
        raise
    except ImportError as error:  # a package that the class needs only now
        raise UserError(f"{section['type']} needs a package that is missing ({error}); install it") from error
    except Exception as error:
        raise UserError(f"{section['type']} cannot be built from {shown(options)}: {where(error)}") from error
