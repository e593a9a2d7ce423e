"""aMUSEd 512 on your own captioned images with LoRA: for a card of 8 GB, and for a few dozen images.

    diffengine train amused_512_own_lora --data FOLDER

The adapter is a file of a few megabytes; the base does not change.
"""

extends = ["amused_512_own", "lora"]

learning_rate = 1e-4
