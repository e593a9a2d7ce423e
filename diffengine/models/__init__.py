"""Models: one folder per model, all behind the contract of base.py.

To add one, write a final subclass of `TrainableModel` (or `MaskedImageModel`) in a folder here or in a module of your
own, and name it in a config's `model`. Nothing else knows models by name.
"""


def trusted_classes() -> set[str]:
    """The classes that a checkpoint may name: our models, what they are built from, and peft's configs."""
    import peft

    return {
        "diffengine.models.amused.AmusedModel",
        "diffengine.models.vq.VQTokenizerModel",
        "diffusers.UVit2DModel",
        "diffusers.VQModel",
        "transformers.CLIPTextConfig",
        *(f"peft.{name}" for name in peft.__all__ if name.endswith("Config")),
    }
