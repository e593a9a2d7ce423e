"""aMUSEd 256 on Nouns with 8-bit Adam: full fine-tuning, for a card of 12 to 16 GB.

    pip install diffengine[8bit]
    diffengine train amused_256_nouns_8bit --cfg-options micro_batch_size=4

The published run: batch 16, learning rate 2e-5, 20.1 GB at 16 images at once, 10.7 GB at 1; decent
after 750 steps.
"""

extends = ["amused_256_nouns", "adam8bit"]

batch_size = 16
max_iters = 750
learning_rate = 2e-5
