"""A subject with prior preservation (DreamBooth): one new dog, and the base's own dogs.

    python tools/emoji_finetune.py subject work_dirs/emoji_subject
    diffengine train amused_32_emoji_dreambooth
    diffengine convert work_dirs/amused_32_emoji_dreambooth --pipeline
    python tools/emoji_finetune.py score amused_32_emoji_dreambooth

The base generates the class images before training.
"""

extends = ["amused_emoji", "subject"]

data = "work_dirs/emoji_subject"
instance_prompt = "sks dog on a white background"
class_data = "work_dirs/emoji_class"
class_prompt = "dog on a white background"
num_class_images = 32
prompts = [
    "sks dog on a white background",
    "sks dog on a blue background",
    "dog on a blue background",
    "cat on a blue background",
]
batch_size = 16
max_iters = 100
preview_every = 100
checkpoint_every = 100

train_dataloader = dict(dataset=dict(class_drawing=dict(guidance_scale=1.0)))
