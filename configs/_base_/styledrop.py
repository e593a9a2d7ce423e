"""A style from one image: what the StyleDrop configs change in `amused_512_own`."""

data = "image.png"
caption = "A mushroom in [V] style."
prompts = ["A tabby cat walking in the forest in [V] style.", "A church on the street in [V] style."]
batch_size = 1
max_iters = 2000
preview_every = 250
checkpoint_every = 500
num_workers = 1  # one image per step
aspect = "square"
