"""aMUSEd 512 on 1,022 Minecraft images: full fine-tuning, for a card of 24 GB.

    diffengine train amused_512_minecraft

Every caption gets the prefix "minecraft ", which becomes the word for the style. The published run: batch 8,
learning rate 8e-5, 24.2 GB in fp16, decent after 500 to 1,000 steps.
"""

extends = "amused_512_own"

data = "monadical-labs/minecraft-preview"
prefix = "minecraft "
prompts = [
    "minecraft pig",
    "minecraft castle in the snow",
    "minecraft village by the sea",
    "minecraft dragon",
]
preview_every = 250
