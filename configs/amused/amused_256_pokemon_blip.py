"""aMUSEd 256 on the Pokemon captions: the 512 recipe, with a quarter of the pixels to encode.

    diffengine train amused_256_pokemon_blip

Once tokens are cached, a step costs nearly as much as at 512: there the transformer halves its token grid first.
"""

extends = "amused_512_pokemon_blip"

pretrained = "amused/amused-256"
resolution = 256
