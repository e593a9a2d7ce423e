"""How fast and how lean diffengine trains. README.md says how to run each, and what came out last."""

import diffengine  # noqa: F401  first: it silences what diffusers and peft make others say
