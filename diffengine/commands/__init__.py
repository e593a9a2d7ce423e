"""One file per command: `arguments(parser)` adds what it takes, `run(options)` does it and returns the exit code."""
