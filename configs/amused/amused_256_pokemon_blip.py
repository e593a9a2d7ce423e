"""aMUSEd 256 on the Pokemon captions: as the 512 recipe, with a quarter of its pixels to encode.

    diffengine train amused_256_pokemon_blip

Once tokens are cached a step costs nearly the same: the 512 transformer halves its grid to that of this one.
"""

extends = "amused_512_pokemon_blip"

pretrained = "amused/amused-256"
resolution = 256
