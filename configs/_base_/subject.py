"""A subject, with images of its class so that the model does not forget the class (DreamBooth).

A config that extends this sets data, instance_prompt, class_data and class_prompt.
"""

from diffengine.datasets import SubjectDataset

num_class_images = 100  # the base generates those that class_data lacks before training
prior_loss_weight = 1.0  # weight of a class image; one of the subject has 1

train_dataloader = dict(
    dataset=dict(
        type=SubjectDataset,
        data="${data}",
        instance_prompt="${instance_prompt}",
        class_data="${class_data}",
        class_prompt="${class_prompt}",
        num_class_images="${num_class_images}",
        prior_loss_weight="${prior_loss_weight}",
    )
)
