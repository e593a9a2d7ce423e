"""aMUSEd 256 on the Pokemon captions: a third of the time of the 512 recipe.

diffengine train amused_256_pokemon_blip
"""

extends = "amused_512_pokemon_blip"

pretrained = "amused/amused-256"
resolution = 256
