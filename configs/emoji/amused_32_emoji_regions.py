"""Teach the emoji base new emoji by masked images: their background is not learnt.

    make demo                        # the base
    python tools/emoji_regions.py    # writes the images, trains this with and without masks, and compares

16 new emoji on four colours, captioned by their names alone, and 24 old ones on plain backgrounds, without masks.
"""

from diffengine.datasets import ImageTextDataset

extends = "amused_emoji"

data = "work_dirs/emoji_regions/data"
unmasked_weight = 0.1

train_dataloader = dict(
    dataset=dict(type=ImageTextDataset, path="${data}"),
    unmasked_weight="${unmasked_weight}",
)
