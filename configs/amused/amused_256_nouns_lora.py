"""aMUSEd 256 on Nouns with LoRA: for a card of 8 GB.

    diffengine train amused_256_nouns_lora --cfg-options micro_batch_size=4

The published run: rank 16, alpha 32, batch 16, learning rate 8e-4, 14.1 GB at 16 images at once, 6.5 GB
at 1; decent after 1,000 to 1,250 steps.
"""

extends = ["amused_256_nouns", "lora"]

batch_size = 16
max_iters = 1250
learning_rate = 8e-4
