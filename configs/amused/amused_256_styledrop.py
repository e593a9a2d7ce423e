"""A style from one picture (StyleDrop, arXiv 2306.00983), aMUSEd 256 with LoRA.

    diffengine train amused_256_styledrop --data picture.png

The caption names the picture's content and, in one new word, its style; ask for other things in that
word. The published run: batch 1, learning rate 4e-4, 6.5 GB, 1,500 to 2,000 steps.
"""

extends = ["amused_256_own", "lora"]

data = "picture.png"
caption = "A mushroom in [V] style."
prompts = ["A tabby cat walking in the forest in [V] style.", "A church on the street in [V] style."]
batch_size = 1
max_iters = 2000
preview_every = 250
checkpoint_every = 500
learning_rate = 4e-4
num_workers = 1
