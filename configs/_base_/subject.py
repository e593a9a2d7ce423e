"""A subject beside pictures of its class, so that the class is not forgotten (DreamBooth)."""

from diffengine.datasets import SubjectDataset

num_class_images = 100
prior_loss_weight = 1.0

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
