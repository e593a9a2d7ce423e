"""How many samples one forward takes: as configured, or as many as the memory holds."""

import gc
import math
from typing import final

import torch

from diffengine import distributed
from diffengine.errors import UserError
from diffengine.text import format_bytes


@final
class MicroBatches:
    """The equal parts in which every rank takes its share of a step. Out of memory, they halve.

    Args:
        batch_size: samples of a step, of all ranks together.
        asked: `micro_batch_size` of the config, to start with; None for a rank's whole share.

    Attributes:
        count: parts of a step, the same on all ranks: a model may talk to other ranks in `forward`.
        found: samples of a part at most, once memory ran out; else None. The checkpoint keeps it.
    """

    def __init__(self, batch_size: int, asked: int | None) -> None:
        self.asked = asked
        self.found: int | None = None
        world = distributed.world_size()
        self._smallest, self._largest = batch_size // world, math.ceil(batch_size / world)  # shares of ranks
        self.count = count_micro_batches(batch_size, asked)

    @property
    def size(self) -> int:
        """Samples of a part, at most."""
        return math.ceil(self._largest / self.count)

    def halve(self) -> bool:
        """Twice as many parts, or one for each sample; False where that is so already."""
        if self.count >= self._smallest:
            return False
        self.count = min(2 * self.count, self._smallest)
        self.found = self.size
        return True

    def too_large(self, reason: str) -> UserError:
        """Not even the smallest part fits."""
        one = self.size == 1
        return too_large(
            "even one image at a time does" if one else f"{self.size} images, the fewest at a time, do",
            reason,
        )

    def state(self) -> dict[str, int | None] | None:
        """What was found, and what the config asked for then; None where all fitted."""
        return None if self.found is None else {"asked": self.asked, "found": self.found}

    def restore(self, state: dict[str, int | None] | None) -> None:
        """Go on with what was found, unless the config now asks for another start."""
        if state is None or state["asked"] != self.asked:
            return
        assert state["found"] is not None
        self.found = state["found"]
        self.count = max(self.count, min(math.ceil(self._largest / self.found), self._smallest))


def count_micro_batches(batch_size: int, micro_batch_size: int | None) -> int:
    """Parts of a step, the same on all ranks.

    Raises:
        UserError: the size is below 1, or a rank's share has fewer samples than that.
    """
    if micro_batch_size is None:
        return 1
    if micro_batch_size < 1:
        raise UserError(f"micro_batch_size got {micro_batch_size}; expected at least 1, or None")
    world = distributed.world_size()
    count = math.ceil(math.ceil(batch_size / world) / micro_batch_size)
    if batch_size // world < count:
        raise UserError(
            f"batch_size {batch_size} over {world} processes gives shares of {batch_size // world} and "
            f"{batch_size // world + 1}, which micro_batch_size {micro_batch_size} cannot split alike; "
            f"set it to {micro_batch_size + 1}, or batch_size to a multiple of {world}"
        )
    return count


def free_memory() -> None:
    """Give back what a failed try has left: what reference cycles still hold, and the allocator's blocks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def too_large(what: str, reason: str) -> UserError:
    """What was needed, what the device has, and what would fit.

    Args:
        what: does, or do, not fit.
        reason: what torch said.
    """
    has = ""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        held = torch.cuda.max_memory_allocated()
        has = (
            f"; {format_bytes(held)} were in use at most, the GPU has {format_bytes(total)} ({format_bytes(free)} free)"
        )
    return UserError(
        f"{what} not fit into memory ({_first_sentences(reason)}){has}: set "
        "model.gradient_checkpointing=True, take an 8-bit optimizer (bitsandbytes.optim.AdamW8bit), or train "
        "adapters (a config whose name ends in _lora)"
    )


def out_of_step(rank: int, step: int, micro: MicroBatches, reason: str) -> UserError:
    """Memory ran out on one of several ranks in the middle of an exchange, which cannot be repeated."""
    return UserError(
        f"process {rank} ran out of memory in step {step} ({_first_sentences(reason)}), after {micro.size} "
        "images at a time had fitted; go on with --resume --cfg-options "
        f"micro_batch_size={max(1, micro.size // 2)}"
    )


def _first_sentences(reason: str, count: int = 2) -> str:
    """The start of torch's message: what it tried to allocate, and what the GPU has."""
    return ". ".join(" ".join(reason.split()).split(". ")[:count]).rstrip(".") or "out of memory"
