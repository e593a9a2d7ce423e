"""aMUSEd 512 on Minecraft images with 8-bit Adam: full fine-tuning, for a card of 12 to 16 GB.

    pip install diffengine[8bit]
    diffengine train amused_512_minecraft_8bit --cfg-options micro_batch_size=4

The published run: learning rate 5e-6, 21.2 GB at 8 images at once, 9.9 GB at 1.
"""

extends = ["amused_512_minecraft", "adam8bit"]

learning_rate = 5e-6
