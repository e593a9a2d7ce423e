"""aMUSEd for 32 px emoji, from scratch: text encoder and transformer on the tokens of `vq_32_emoji`.

    diffengine train vq_32_emoji
    diffengine train amused_32_emoji
    diffengine convert amused_32_emoji work_dirs/amused_32_emoji/iter_600.pth emoji --pipeline
    diffengine sample emoji "penguin on a blue background" --guidance 1

The model also generates emoji on backgrounds on which it has never seen them.
"""

from diffengine.datasets import EmojiDataset

extends = ["emoji_model", "emoji_pictures"]

validation_data = dict(  # the combinations that are not trained
    type=EmojiDataset,
    split="unseen",
    count="${emoji}",
    backgrounds="${backgrounds}",
    min_transparent="${min_transparent}",
    size="${resolution}",
)
