"""aMUSEd 256 on your own captioned images, 1,000 steps, with a quarter of the pixels to encode.

    diffengine train amused_256_own --data FOLDER

Published FID is far better at guidance 4 than at the pipeline's default of 10 for the 256 model, so
previews use 4.
"""

extends = "amused_512_own"

pretrained = "amused/amused-256"
resolution = 256
learning_rate = 1e-4
default_hooks = dict(preview=dict(options=dict(guidance_scale=4.0)))
