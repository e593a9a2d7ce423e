"""What every test needs before anything is imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # two processes, two cores; its threads do not survive a fork
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
