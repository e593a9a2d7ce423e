"""Shared by all fine-tunes of the released aMUSEd. A config changes settings; the sections refer to them."""

from torch.optim import AdamW

from diffengine.datasets import Crop, DropCaption, Flip, ImageTextDataset, Resize, ToTensor
from diffengine.models.amused import AmusedModel

extends = "default_runtime"

data = "reach-vb/pokemon-blip-captions"  # a hub name, a folder of images or a parquet file; or a list
pretrained = "amused/amused-512"  # a hub name, or a folder with the five components
resolution = 512  # side of the square images, in pixels
batch_size = 8  # images per optimizer step, of all GPUs together
micro_batch_size = None  # images per forward on one GPU; None: a GPU's whole share
max_epochs = None  # set one of the two; intervals count in its unit
max_iters = None
learning_rate = 1e-4
lr_schedule = "constant"
warmup_iters = 0
weight_decay = 1e-2
gradient_checkpointing = False  # a third less speed for far less memory
compile = "auto"  # torch.compile for the blocks, if it pays within the run
caption_dropout = 0.1  # share of samples trained without caption, for guidance
shuffle_tags = False  # for captions such as "1girl, red hair, hat": their tags in another order each time
drop_tags = 0.0  # share of a caption's tags that are left out
keep_tags = 1  # so many first tags always stay
tag_separator = ","
caption_variations = None  # shuffles and drops of a caption, taken in turn; None: a new one each time, not cached
unmasked_weight = 0.1  # in data with masks (NAME.mask.png): how much the black counts; 0: not at all, 1: as the white
flip = 0.5  # share of samples mirrored
random_crop = True
aspect = "square"  # "keep": each image in the shape nearest to its own, with at most as many tokens as the square
max_aspect = 2.0  # the longest shape with aspect="keep": 2:1
image_variations = 8  # crops and flips of an image, taken in turn; None: a new one each time, and no cache
num_workers = 4

model = dict(
    type=AmusedModel,
    pretrained="${pretrained}",
    train=["transformer"],
    mask_schedule="cosine",
    gradient_checkpointing="${gradient_checkpointing}",
)
train_dataloader = dict(
    dataset=dict(type=ImageTextDataset, path="${data}"),
    image_transforms=[
        dict(type=Resize, size="${resolution}"),
        dict(type=Flip, p="${flip}"),
        dict(type=Crop, size="${resolution}", random="${random_crop}"),
        dict(type=ToTensor),
    ],
    # The run appends the model's transform, RandomMask (models/masking.py), which draws the mask of each sample.
    transforms=[dict(type=DropCaption, p="${caption_dropout}")],
    batch_size="${batch_size}",
    num_workers="${num_workers}",
    image_variations="${image_variations}",
    shuffle_tags="${shuffle_tags}",
    drop_tags="${drop_tags}",
    keep_tags="${keep_tags}",
    tag_separator="${tag_separator}",
    caption_variations="${caption_variations}",
    unmasked_weight="${unmasked_weight}",
    aspect="${aspect}",
    max_aspect="${max_aspect}",
)
optim_wrapper = dict(optimizer=dict(type=AdamW, lr="${learning_rate}", weight_decay="${weight_decay}"))
param_scheduler = dict(name="${lr_schedule}", warmup_iters="${warmup_iters}")
train_cfg = dict(
    max_epochs="${max_epochs}",
    max_iters="${max_iters}",
    micro_batch_size="${micro_batch_size}",
    compile="${compile}",
)
default_hooks = dict(preview=dict(resolution="${resolution}"))
