"""aMUSEd 512 on your own captioned images with LoRA: for a card of 8 GB, and for a few dozen images.

    diffengine train amused_512_own_lora --data FOLDER

The file that is shared is some megabytes, and the base stays as it is.
"""

extends = ["amused_512_own", "lora"]

learning_rate = 1e-4
