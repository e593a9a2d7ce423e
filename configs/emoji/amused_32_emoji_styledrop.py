"""One image and one new word (StyleDrop): the emoji base sees one concept as another artist draws it.

    diffengine train amused_32_emoji_styledrop
    diffengine convert work_dirs/amused_32_emoji_styledrop --pipeline
    python tools/emoji_finetune.py score amused_32_emoji_styledrop

It is then asked for other concepts in that hand. One image teaches itself, and little of the hand.
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
