"""Teach the emoji base emoji that it has not seen: adapters on transformer and text encoder.

    make demo               # the base
    make demo-finetune      # this, and its score

The adapter learns 16 new emoji on three backgrounds each; the score asks for them on the fourth. The base's
vocabulary splits their names into pieces that it never learnt, so the text encoder's embeddings have an adapter
too, with a higher rank than the transformer's, which must keep its ability to compose. 24 old emoji are mixed
in: without them, the model forgot nine in ten.
"""

extends = ["amused_emoji", "emoji_pictures"]

first = 104  # the base knows those before 128: 24 old emoji and 16 new ones
emoji = 40
batch_size = 32
max_iters = 400
learning_rate = 2e-3

train_dataloader = dict(dataset=dict(start="${first}"))
