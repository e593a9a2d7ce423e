"""`python tools/train.py CONFIG ...` runs `diffengine train CONFIG ...`. torchrun and srun start this script."""

import sys

from diffengine.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
