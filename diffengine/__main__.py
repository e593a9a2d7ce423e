"""`python -m diffengine` is the `diffengine` command."""

from diffengine.cli import console

if __name__ == "__main__":
    console()
