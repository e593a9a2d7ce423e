"""Shared by emoji models that are trained from scratch: text encoder and transformer, on the tokens of `vq_32_emoji`.

A config that extends this sets the data.
"""

from diffusers import UVit2DModel
from torch.optim import AdamW
from transformers import CLIPTextConfig

from diffengine.datasets import DropCaption
from diffengine.models.amused import AmusedModel

extends = "default_runtime"

vqvae = "work_dirs/vq_32_emoji"  # where `vq_32_emoji` was trained
resolution = 32
num_workers = 0
prompts = 16
batch_size = 64
max_iters = 600
preview_every = 200
checkpoint_every = 200
keep_checkpoints = 2
learning_rate = 2e-3
caption_dropout = 0.05
dropout = 0.1  # in the transformer: without it, unseen combinations fail
log_every = 25

model = dict(
    type=AmusedModel,
    train=["transformer", "text_encoder"],
    vqvae="${vqvae}",
    tokenizer=dict(vocab_size=2048, max_length=16),
    text_encoder=dict(
        type=CLIPTextConfig,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        projection_dim=128,
    ),
    transformer=dict(
        type=UVit2DModel,
        hidden_size=128,
        hidden_dropout="${dropout}",
        micro_cond_encode_dim=32,
        in_channels=128,
        block_out_channels=128,
        num_res_blocks=1,
        downsample=True,  # the layers see 4x4 positions, which makes it fast
        upsample=True,
        block_num_heads=4,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=344,
        sample_size=8,
    ),
)
train_dataloader = dict(
    # The run appends the model's transform, RandomMask (models/masking.py), which draws the mask of each sample.
    transforms=[dict(type=DropCaption, p="${caption_dropout}")],
    batch_size="${batch_size}",
    num_workers="${num_workers}",
)
optim_wrapper = dict(optimizer=dict(type=AdamW, lr="${learning_rate}", betas=[0.9, 0.98], weight_decay=0.1))
param_scheduler = dict(name="cosine", warmup_iters=100)
train_cfg = dict(max_iters="${max_iters}")
default_hooks = dict(
    preview=dict(resolution="${resolution}", options=dict(guidance_scale=1.0, strip=True)),
)
