"""A VQ model for 32 px emoji, from scratch, in two minutes on a laptop.

    diffengine train vq_32_emoji

128 emoji on four backgrounds, as 8x8 tokens of 256 codes. Neither this model nor `amused_32_emoji` sees one of
the four backgrounds of each emoji. The images come with the packages of `pip install diffengine[emoji]`.
"""

from diffusers import VQModel
from torch.optim import AdamW

from diffengine.models.vq import VQTokenizerModel

extends = ["default_runtime", "emoji_pictures"]

codes = 256
batch_size = 32
max_iters = 600
quantize_after = 100  # steps without the codebook
reseed_until = 450
prompts = 16  # images to preview
preview_every = 300
checkpoint_every = 300
keep_checkpoints = 2
learning_rate = 1e-3
log_every = 25
validation_every = 0  # a VQ model has no masked tokens

model = dict(
    type=VQTokenizerModel,
    vqvae=dict(
        type=VQModel,
        block_out_channels=[16, 32, 64],  # three levels: 4 pixels per token and side
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        num_vq_embeddings="${codes}",
        sample_size="${resolution}",
        mid_block_add_attention=False,
        lookup_from_codebook=True,
        force_upcast=True,
    ),
    quantize_after="${quantize_after}",
    reseed_every=25,
    reseed_until="${reseed_until}",
)
optim_wrapper = dict(optimizer=dict(type=AdamW, lr="${learning_rate}", betas=[0.9, 0.99], weight_decay=1e-4))
param_scheduler = dict(name="cosine", warmup_iters=20)
train_cfg = dict(max_iters="${max_iters}")
