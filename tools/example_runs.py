"""Train four small models whose curves look different, for docs/reading-the-curves.md.

    diffengine train vq_32_emoji
    python tools/example_runs.py work_dirs/examples

One learns; one has the time to memorize; one gets a random caption for each image; one learns far too fast. All of them
validate on combinations of emoji and background that are never trained. Then `diffengine report WORK_DIR` for each.
"""

import sys
from pathlib import Path
from typing import Any

import diffengine
from diffengine.datasets import EmojiDataset, Sample
from diffengine.errors import UserError


class AnyCaption(EmojiDataset):
    """Emoji whose captions are drawn from all captions: they say nothing of the image."""

    def __getitem__(self, index: int) -> Sample:
        captions = sorted({caption for texts in self.all_captions() for caption in texts})
        return {**super().__getitem__(index), "text": captions}


OPTIONS = {"count": "emoji", "backgrounds": "backgrounds", "min_transparent": "min_transparent", "size": "resolution"}
ANY_CAPTION = {"type": "example_runs.AnyCaption", **{name: f"${{{setting}}}" for name, setting in OPTIONS.items()}}

RUNS: dict[str, dict[str, Any]] = {
    "good": {"max_iters": 300, "dropout": 0.2},
    "over-fitted": {"max_iters": 600, "dropout": 0.0},
    "captions-ignored": {
        "max_iters": 300,
        "dropout": 0.2,
        "train_dataloader": {"dataset": ANY_CAPTION},
    },
    "diverged": {"max_iters": 300, "learning_rate": 3.0, "clip_grad": None, "log_every": 10},
}


def main(folder: str = "work_dirs/examples") -> None:
    for name, settings in RUNS.items():
        steps = {"preview_every": 50, "checkpoint_every": settings["max_iters"]}
        try:
            diffengine.train("amused_32_emoji", work_dir=f"{folder}/{name}", overwrite=True, **steps, **settings)
        except UserError as error:
            print(f"{name}: {error}")
    print(f"compare them: diffengine report {' '.join(str(Path(folder) / name) for name in RUNS)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
