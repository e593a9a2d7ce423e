"""A subject beside images of its class, so that the class is not forgotten (DreamBooth).

A config that extends this sets data, instance_prompt, class_data and class_prompt.
"""

from diffengine.datasets import SubjectDataset

num_class_images = 100  # those that class_data lacks are drawn by the base before training
prior_loss_weight = 1.0  # of a class image beside one of the subject

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
