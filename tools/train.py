"""`python tools/train.py CONFIG ...` is `diffengine train CONFIG ...`; also what torchrun and srun start."""

import sys

from diffengine.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
