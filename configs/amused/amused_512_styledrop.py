"""A style from one image (StyleDrop, arXiv 2306.00983), aMUSEd 512 with LoRA.

    diffengine train amused_512_styledrop --data image.png

See `amused_256_styledrop`. The published run: batch 1, learning rate 1e-3 with alpha 1, 5.6 GB, 1,500 to
2,000 steps.
"""

extends = ["amused_512_own", "lora", "styledrop"]

learning_rate = 1e-3
alpha = 1
