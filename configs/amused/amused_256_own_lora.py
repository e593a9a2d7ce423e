"""aMUSEd 256 on your own captioned images with LoRA: the smallest card, and a first evening.

    diffengine train amused_256_own_lora --data FOLDER

The published 256 LoRA run needs 6.5 GB at one image at once.
"""

extends = ["amused_256_own", "lora"]

learning_rate = 8e-4
