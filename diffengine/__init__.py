"""diffengine: a config-driven trainer for aMUSEd, on mmengine and diffusers."""

import logging

# Diffusers and peft import bitsandbytes where it is installed, and it tells of what it lacks.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
