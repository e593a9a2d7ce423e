"""A style from one image (StyleDrop, arXiv 2306.00983), aMUSEd 256 with LoRA.

    diffengine train amused_256_styledrop --data image.png

The caption names the image's content and, with one new word, its style; use that word to ask for other
things in the style. The published run: batch 1, learning rate 4e-4, 6.5 GB, 1,500 to 2,000 steps.
"""

extends = ["amused_256_own", "lora", "styledrop"]

learning_rate = 4e-4
