"""diffengine: a config-driven trainer for aMUSEd, on mmengine and diffusers.

run = diffengine.train("amused_512_own_lora", data="photos", batch_size=4)
run.pipeline()("a dog in the snow").images[0]
"""

import importlib
import logging
from typing import Any

from diffengine.errors import UserError

# Diffusers and peft import bitsandbytes if it is installed, and it logs what it lacks.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.2.0.dev0"
__all__ = ["UserError", "build_cache", "check", "convert", "evaluate", "inspect_data", "sample", "train"]


def __getattr__(name: str) -> Any:
    """A function of api.py, imported on first use: `import diffengine` stays instant."""
    if name in __all__:
        return getattr(importlib.import_module("diffengine.api"), name)
    raise AttributeError(f"module 'diffengine' has no attribute '{name}'")
