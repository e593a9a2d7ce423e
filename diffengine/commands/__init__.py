"""One file per command: `arguments(parser)` says what it takes, `run(options) -> exit code` does it.

Imports of torch and the like stay inside `run`.
"""
