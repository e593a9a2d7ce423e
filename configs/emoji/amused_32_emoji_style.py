"""Teach the emoji base another artist's style by adapters: 64 of its concepts in OpenMoji's style.

    diffengine train amused_32_emoji_style
    diffengine convert work_dirs/amused_32_emoji_style --pipeline
    python tools/emoji_finetune.py score amused_32_emoji_style

The score asks for the other 62 concepts in that style, which the model saw in Twemoji's only. Twemoji's images
of the 64 are mixed in, so that the model uses the new style only when the caption names it.
"""

extends = "amused_32_emoji_lora"

first = 64
emoji = 64
artists = dict(twemoji="", openmoji="in ink")
transformer_rank = 8  # higher: a style is learnt in the transformer
transformer_alpha = 16
text_rank = 8
text_alpha = 16
lora_dropout = 0.0

train_dataloader = dict(dataset=dict(artists="${artists}"))
