"""diffengine: a config-driven trainer for aMUSEd, on mmengine and diffusers."""

__version__ = "0.1.0"
