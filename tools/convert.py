"""`python tools/convert.py CONFIG CKPT OUT ...` runs `diffengine convert CONFIG CKPT OUT ...`."""

import sys

from diffengine.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
