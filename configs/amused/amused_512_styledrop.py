"""A style from one picture (StyleDrop, arXiv 2306.00983), aMUSEd 512 with LoRA.

    diffengine train amused_512_styledrop --data picture.png

As `amused_256_styledrop`. The published run: batch 1, learning rate 1e-3 with alpha 1, 5.6 GB, 1,500 to
2,000 steps.
"""

extends = ["amused_512_own", "lora"]

data = "picture.png"
caption = "A mushroom in [V] style."
prompts = ["A tabby cat walking in the forest in [V] style.", "A church on the street in [V] style."]
batch_size = 1
max_iters = 2000
preview_every = 250
checkpoint_every = 500
learning_rate = 1e-3
alpha = 1
num_workers = 1
