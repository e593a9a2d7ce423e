"""Shared by the fine-tunes of the emoji base, which `make demo` trains."""

from peft import LoraConfig
from torch.optim import AdamW

from diffengine.datasets import DropCaption, ToTensor
from diffengine.models.amused import AmusedModel

extends = "default_runtime"

pretrained = "work_dirs/emoji_demo/pipeline"
resolution = 32
prompts = 16
batch_size = 32
max_iters = 400
preview_every = 400
checkpoint_every = 400
keep_checkpoints = 1
learning_rate = 2e-3
warmup_iters = 20
weight_decay = 0.0
caption_dropout = 0.0
num_workers = 0
transformer_rank = 4
transformer_alpha = 8  # strength is alpha / rank
text_rank = 32  # higher: the text encoder learns the new words, the transformer keeps its ability to compose
text_alpha = 64
lora_dropout = 0.1
log_every = 25
validation_share = 0  # few images, all to be learnt

model = dict(
    type=AmusedModel,
    pretrained="${pretrained}",
    train=[],
    adapters=dict(
        transformer=dict(
            type=LoraConfig,
            r="${transformer_rank}",
            lora_alpha="${transformer_alpha}",
            lora_dropout="${lora_dropout}",
            target_modules=[
                "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2",
                "norm1.linear", "norm2.linear", "norm3.linear",
                "channelwise_linear_1", "channelwise_linear_2", "cond_embeds_mapper",
            ],
        ),
        text_encoder=dict(
            type=LoraConfig,
            r="${text_rank}",
            lora_alpha="${text_alpha}",
            lora_dropout="${lora_dropout}",
            target_modules=["token_embedding", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        ),
    ),
)  # fmt: skip
train_dataloader = dict(
    image_transforms=[dict(type=ToTensor)],
    # The run appends the model's transform, RandomMask (models/masking.py), which draws the mask of each sample.
    transforms=[dict(type=DropCaption, p="${caption_dropout}")],
    batch_size="${batch_size}",
    num_workers="${num_workers}",
)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr="${learning_rate}", betas=[0.9, 0.98], weight_decay="${weight_decay}")
)
param_scheduler = dict(name="cosine", warmup_iters="${warmup_iters}")
train_cfg = dict(max_iters="${max_iters}")
default_hooks = dict(preview=dict(resolution="${resolution}", options=dict(guidance_scale=1.0)))
