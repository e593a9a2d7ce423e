"""aMUSEd 512 on the Pokemon captions with LoRA: for a card of 8 GB.

    diffengine train amused_512_pokemon_blip_lora --cfg-options micro_batch_size=1

The reference recipe with the learning rate of the published 512 LoRA runs, which took 12.7 GB with 8 images
per forward pass.
"""

extends = ["amused_512_pokemon_blip", "lora"]

learning_rate = 1e-4
