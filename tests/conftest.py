"""What every test needs before anything is imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
