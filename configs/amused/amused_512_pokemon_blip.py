"""aMUSEd 512 on the Pokemon captions: the reference recipe.

    diffengine train amused_512_pokemon_blip
    NPROC_PER_NODE=8 diffengine train amused_512_pokemon_blip

833 captioned drawings; `reach-vb/pokemon-blip-captions` is the copy of the data set that still exists.
"""

extends = "amused"

data = "reach-vb/pokemon-blip-captions"
pretrained = "amused/amused-512"
resolution = 512
prompts = ["yoda pokemon"] * 4
batch_size = 8
max_epochs = 50
preview_every = 1
checkpoint_every = 1
keep_checkpoints = 3
learning_rate = 1e-4
precision = "auto"
caption_dropout = 0.1
flip = 0.5
