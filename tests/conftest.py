"""What every test needs before anything is imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # two test processes on two cores, and tests fork: OpenMP's threads do not
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
