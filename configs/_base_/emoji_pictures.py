"""Shared by the emoji configs: images that come with the packages of `diffengine[emoji]`.

A config that extends this sets batch_size.
"""

from diffengine.datasets import EmojiDataset, ToTensor

emoji = 128
backgrounds = dict(white=[255, 255, 255], pink=[255, 195, 210], green=[195, 240, 200], blue=[190, 215, 255])
min_transparent = 0.35  # an emoji that covers more of its background is left out
resolution = 32
num_workers = 0  # the images are in memory

train_dataloader = dict(
    dataset=dict(
        type=EmojiDataset,
        count="${emoji}",
        backgrounds="${backgrounds}",
        min_transparent="${min_transparent}",
        size="${resolution}",
    ),
    image_transforms=[dict(type=ToTensor)],
    batch_size="${batch_size}",
    num_workers="${num_workers}",
)
