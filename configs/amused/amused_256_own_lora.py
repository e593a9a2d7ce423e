"""aMUSEd 256 on your own captioned images with LoRA: for the smallest card.

    diffengine train amused_256_own_lora --data FOLDER

The published 256 LoRA run needs 6.5 GB with one image per forward pass.
"""

extends = ["amused_256_own", "lora"]

learning_rate = 8e-4
