"""One image and one new word (StyleDrop): the emoji base learns one concept in another artist's style.

    diffengine train amused_32_emoji_styledrop
    diffengine convert work_dirs/amused_32_emoji_styledrop --pipeline
    python tools/emoji_finetune.py score amused_32_emoji_styledrop

The score asks for other concepts in that style. From one image the model learns the image, and little of the
style.
"""

extends = "amused_32_emoji_lora"

first = 114  # penguin
emoji = 1
artists = dict(openmoji="in ink")
backgrounds = dict(white=[255, 255, 255])
prompts = 1
batch_size = 8
max_iters = 100
learning_rate = 1e-3
preview_every = 100
checkpoint_every = 100

train_dataloader = dict(dataset=dict(artists="${artists}", split="all"))
