"""How fast and how lean diffengine trains. README.md says how to run each, and what came out last."""
