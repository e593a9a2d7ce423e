"""Training the VQ tokenizer itself."""

from diffengine.models.vq.model import VQTokenizerModel

__all__ = ["VQTokenizerModel"]
