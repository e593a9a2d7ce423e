"""The token cache: what frozen encoders make of images and captions, computed once and kept on disk.

checked.py      files that are used only if they are intact
tables.py       Arrow tables of checked chunks
samples.py      which rows they hold, and how a sample comes back out of one
fingerprint.py  digests of what they were made from
token_cache.py  the cache of a run: whether it pays, built by all ranks, checked, attached
"""

from diffengine.cache.samples import CachedDataset
from diffengine.cache.token_cache import TokenCache

__all__ = ["CachedDataset", "TokenCache"]
