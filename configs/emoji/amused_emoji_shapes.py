"""One emoji, two side by side, or two one above the other: images of three shapes, each trained in its own.

    python tools/emoji_shapes.py        # writes the images, trains this config twice, and compares

Pairs are of 64x32 and 32x64 px, single emoji of 48x48. With aspect="square" the middle of each pair is cut out.
"""

from diffengine.datasets import Crop, ImageTextDataset, Resize, ToTensor

extends = "emoji_model"

data = "work_dirs/emoji_shapes/data"
resolution = 48
aspect = "keep"
max_aspect = 2.0
batch_size = 64
max_iters = 800
validation_share = 0

train_dataloader = dict(
    dataset=dict(type=ImageTextDataset, path="${data}"),
    image_transforms=[
        dict(type=Resize, size="${resolution}"),
        dict(type=Crop, size="${resolution}", random=False),
        dict(type=ToTensor),
    ],
    aspect="${aspect}",
    max_aspect="${max_aspect}",
)
