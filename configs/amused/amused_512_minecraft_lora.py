"""aMUSEd 512 on Minecraft images with LoRA: for a card of 8 GB.

    diffengine train amused_512_minecraft_lora --cfg-options micro_batch_size=1

The published run: learning rate 1e-4, 12.7 GB at 8 images at once, 5.6 GB at 1; decent after 500 to
1,000 steps.
"""

extends = ["amused_512_minecraft", "lora"]

learning_rate = 1e-4
