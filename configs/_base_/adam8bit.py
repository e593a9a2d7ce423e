"""AdamW with its state in 8 bits: a config that extends this needs 6 bytes less per trained parameter.

Needs bitsandbytes: pip install diffengine[8bit]
"""

from bitsandbytes.optim import AdamW8bit

optim_wrapper = dict(optimizer=dict(type=AdamW8bit, lr="${learning_rate}", weight_decay="${weight_decay}"))
