"""aMUSEd 256 on 49,900 Nouns (CC0): full fine-tuning, for a card of 24 GB.

    diffengine train amused_256_nouns

The published run: batch 8, learning rate 1e-4, 19.7 GB in fp16, decent after 750 to 1,000 steps.
"""

extends = "amused"

data = "m1guelpf/nouns"
pretrained = "amused/amused-256"
resolution = 256
prompts = [
    "a pixel art character with square red glasses, a baseball-shaped head and a orange-colored body",
    "a pixel art character with square black glasses, a toothbrush-shaped head and a redpinkish-colored body",
]
batch_size = 8
max_iters = 1000
preview_every = 250
checkpoint_every = 250
learning_rate = 1e-4
flip = 0.0
