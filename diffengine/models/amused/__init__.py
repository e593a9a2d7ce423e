"""aMUSEd (arXiv 2401.01808): a frozen VQ model, a CLIP text encoder, and a U-ViT that predicts masked tokens."""

from diffengine.models.amused.model import AmusedModel

__all__ = ["AmusedModel"]
