"""aMUSEd 512 on your own captioned images, 1,000 steps.

    diffengine train amused_512_own --data FOLDER

FOLDER holds images with a metadata.csv (file_name,text), or one NAME.txt per image. For one caption for all
images: --cfg-options caption="a photo of sks dog". Each image keeps its shape, up to 2:1. Images are not mirrored,
since lettering and faces should not be.
"""

extends = "amused"

data = "pictures"  # or a list: ["one", dict(path="two", repeats=3, weight=0.5)], see docs/recipes.md
caption = None  # one caption for all images
prefix = ""  # put before every caption
pretrained = "amused/amused-512"
resolution = 512
prompts = 4  # previews: how many captions to take from the data, or captions of your own
batch_size = 8
max_iters = 1000
preview_every = 100
checkpoint_every = 250
learning_rate = 8e-5  # the published 512 fine-tuning recipe
precision = "auto"
caption_dropout = 0.1
flip = 0.0
aspect = "keep"

train_dataloader = dict(dataset=dict(caption="${caption}", prefix="${prefix}"))
