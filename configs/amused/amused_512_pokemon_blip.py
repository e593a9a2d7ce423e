"""aMUSEd 512 on the Pokemon captions: the reference recipe.

    diffengine train amused_512_pokemon_blip
    NPROC_PER_NODE=8 diffengine train amused_512_pokemon_blip

833 captioned images; `reach-vb/pokemon-blip-captions` is the copy of the data set that still exists.
"""

extends = "amused"

prompts = ["yoda pokemon"] * 4
max_epochs = 50
validation_share = 0  # the reference recipe trains on all images
