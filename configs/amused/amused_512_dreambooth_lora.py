"""A subject from a few images (DreamBooth, arXiv 2208.12242), aMUSEd 512 with LoRA.

    diffengine train amused_512_dreambooth_lora --data FOLDER --cfg-options class_data=work_dirs/dogs

FOLDER holds three to ten images of the subject. Half of every step shows images of the
subject's class, so that the model does not forget the class. The base model generates the class images that
`class_data` lacks before training, and they stay there for the next run.
"""

extends = ["amused", "lora", "subject"]

data = "pictures"
instance_prompt = "a photo of sks dog"
class_data = "work_dirs/class_pictures/dog"
class_prompt = "a photo of a dog"
pretrained = "amused/amused-512"
resolution = 512
prompts = [
    "a photo of sks dog in the snow",
    "a photo of sks dog on a beach",
    "a photo of a dog",
    "a photo of a cat",
]
batch_size = 8
max_iters = 1000
preview_every = 250
checkpoint_every = 250
learning_rate = 1e-4
flip = 0.0
