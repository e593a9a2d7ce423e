"""Teach the emoji base new emoji from images with noise around them, which masks keep from being learnt.

    python tools/emoji_finetune.py regions work_dirs/emoji_regions
    diffengine train amused_32_emoji_regions
    diffengine convert work_dirs/amused_32_emoji_regions --pipeline
    python tools/emoji_finetune.py score amused_32_emoji_regions

Each of 16 new emoji has eight images, captioned by its name alone, and a mask for each; 24 old ones on plain
backgrounds are mixed in, whole. The score asks for the new ones on plain backgrounds.
"""

from diffengine.datasets import ImageTextDataset

extends = "amused_emoji"

data = "work_dirs/emoji_regions"
unmasked_weight = 0.1
learning_rate = 2e-3

train_dataloader = dict(
    dataset=dict(type=ImageTextDataset, path="${data}"),
    unmasked_weight="${unmasked_weight}",
)
