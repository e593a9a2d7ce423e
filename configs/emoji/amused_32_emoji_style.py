"""Teach the emoji base another artist's hand, by adapters: 64 of its concepts as OpenMoji draws them.

    diffengine train amused_32_emoji_style
    diffengine convert work_dirs/amused_32_emoji_style --pipeline
    python tools/emoji_finetune.py score amused_32_emoji_style

It is then asked for the other 62 in that hand, of which it saw Twemoji's only. Twemoji's images of the 64
are shown as well, so that the hand hangs on the words and is not drawn unasked.
"""

extends = "amused_32_emoji_lora"

first = 64
emoji = 64
artists = dict(twemoji="", openmoji="in ink")
transformer_rank = 8  # a hand is learnt where images are
transformer_alpha = 16
text_rank = 8
text_alpha = 16
lora_dropout = 0.0

train_dataloader = dict(dataset=dict(artists="${artists}"))
