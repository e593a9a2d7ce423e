"""Benchmarks of training speed and memory. README.md explains how to run them and lists the latest results."""

import diffengine  # noqa: F401  first: it silences the libraries that diffusers and peft import
