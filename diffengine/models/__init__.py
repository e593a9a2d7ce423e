"""Models. To add one, name a final subclass of base.py's TrainableModel or MaskedImageModel in a config's `model`."""


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
