"""Teach the emoji base emoji that it has not seen: adapters on transformer and text encoder.

    make demo               # the base
    make demo-finetune      # this, and its score

16 new emoji on three backgrounds each; it is then asked for them on the fourth. Their names are words that
the base's vocabulary spells in pieces it never learnt, so the text encoder's embeddings have an adapter too,
of a higher rank than the transformer's: what the transformer composes is kept. 24 old emoji are shown beside
the new ones, since of those that nothing shows nine in ten were forgotten.
"""

extends = ["amused_emoji", "emoji_pictures"]

first = 104  # the base knows those before 128: 24 old emoji and 16 new ones
emoji = 40
batch_size = 32
max_iters = 400
learning_rate = 2e-3

train_dataloader = dict(dataset=dict(start="${first}"))
