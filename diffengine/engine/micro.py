"""How many samples one forward pass takes: as configured, or as many as fit into memory."""

import gc
import math
from collections.abc import Callable
from typing import TypeVar, final

import torch

from diffengine import distributed
from diffengine.errors import UserError
from diffengine.text import format_bytes

T = TypeVar("T")
TRIALS = 2  # steps that several ranks try before they take them


@final
class MicroBatches:
    """The equal micro-batches in which every rank takes its share of a step. Out of memory, they halve.

    Args:
        batch_size: samples of a step, of all ranks together.
        asked: `micro_batch_size` of the config, to start with; None for a rank's whole share.

    Attributes:
        count: micro-batches per step, the same on all ranks: a model may talk to other ranks in `forward`.
        found: the most samples of a micro-batch, once memory ran out; else None. The checkpoint stores it.

    Raises:
        UserError: `asked` is below 1, or cannot split every rank's share into the same number.
    """

    def __init__(self, batch_size: int, asked: int | None) -> None:
        self.asked = asked
        self.found: int | None = None
        world = distributed.world_size()
        self._smallest, self._largest = batch_size // world, math.ceil(batch_size / world)  # shares of ranks
        self._untested = TRIALS if world > 1 else 0
        if asked is not None and asked < 1:
            raise UserError(f"micro_batch_size got {asked}; expected at least 1, or None")
        self.count = 1 if asked is None else math.ceil(self._largest / asked)
        if self._smallest < self.count:
            raise UserError(
                f"batch_size {batch_size} over {world} processes gives shares of {self._smallest} and "
                f"{self._smallest + 1}, which micro_batch_size {asked} cannot split alike; set it to "
                f"{(asked or 0) + 1}, or batch_size to a multiple of {world}"
            )

    @property
    def size(self) -> int:
        """Samples of a micro-batch, at most."""
        return math.ceil(self._largest / self.count)

    def fit(
        self,
        attempt: Callable[[bool], T],
        snapshot: Callable[[], Callable[[], None]],
        report: Callable[[str], None],
        step: int,
    ) -> T:
        """Take a step's gradients, in smaller micro-batches as long as memory runs out on any rank.

        Ranks exchange gradients inside the backward pass, and one that fails there leaves the others waiting. So with
        several ranks the first steps of a process are tried without an exchange before they are taken: two steps,
        since the optimizer's state is allocated in the first.

        Args:
            attempt: does it; takes whether gradients are exchanged.
            snapshot: returns what undoes an attempt.
            report: logs a line.
            step: its number, for messages.

        Raises:
            UserError: not even the smallest micro-batch fits; or memory ran out on one of several ranks later.
        """
        if distributed.world_size() == 1:
            return self._search(lambda: attempt(True), snapshot, report, step, keep=True)
        if self._untested:
            self._search(lambda: attempt(False), snapshot, report, step, keep=False)
            self._untested -= 1
        try:
            return attempt(True)
        except torch.OutOfMemoryError as error:  # in the middle of an exchange, which cannot be repeated
            raise UserError(
                f"process {distributed.rank()} ran out of memory in step {step} ({_first_sentences(str(error))}), "
                f"after {self.size} images at a time had fitted; continue with --resume --cfg-options "
                f"micro_batch_size={max(1, self.size // 2)}"
            ) from error

    def _search(
        self,
        attempt: Callable[[], T],
        snapshot: Callable[[], Callable[[], None]],
        report: Callable[[str], None],
        step: int,
        keep: bool,
    ) -> T:
        """The first attempt that fits on all ranks; undone again unless `keep`."""
        while True:
            undo = snapshot()
            reason, result = None, None
            try:
                result = attempt()
            except torch.OutOfMemoryError as error:
                reason = str(error)
            (failed,) = distributed.add_counts(int(reason is not None))
            if failed or not keep:
                undo()
            if not failed:
                return result  # type: ignore[return-value]
            gc.collect()  # reference cycles of the failed attempt hold memory
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            before = self.size
            if not self.halve():
                distributed.share_error(None if reason is None else self.too_large(reason))
            report(
                f"out of memory with {before} images at a time: step {step} is taken again with {self.size}, and so "
                "are all after it (micro_batch_size)"
            )

    def halve(self) -> bool:
        """Twice as many micro-batches, or one per sample; False if that is so already."""
        if self.count >= self._smallest:
            return False
        self.count = min(2 * self.count, self._smallest)
        self.found = self.size
        return True

    def too_large(self, reason: str) -> UserError:
        """The error if not even the smallest micro-batch fits."""
        fewest = "even one image at a time does" if self.size == 1 else f"{self.size} images, the fewest at a time, do"
        return too_large(fewest, reason)

    def state(self) -> dict[str, int | None] | None:
        """What was found, and what the config asked for then; None if everything fitted."""
        return None if self.found is None else {"asked": self.asked, "found": self.found}

    def restore(self, state: dict[str, int | None] | None) -> None:
        """Continue with what was found, unless the config now asks for another size."""
        if state is None or state["asked"] != self.asked:
            return
        assert state["found"] is not None
        self.found = state["found"]
        self.count = max(self.count, min(math.ceil(self._largest / self.found), self._smallest))


def too_large(what: str, reason: str) -> UserError:
    """The error for what does not fit into memory: what was needed, what the device has, and what would fit.

    Args:
        what: "X does" or "X do".
        reason: torch's message.
    """
    device = ""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        used = torch.cuda.max_memory_allocated()
        device = (
            f"; {format_bytes(used)} were in use at most, the GPU has {format_bytes(total)} ({format_bytes(free)} free)"
        )
    return UserError(
        f"{what} not fit into memory ({_first_sentences(reason)}){device}: set model.gradient_checkpointing=True, "
        "take an 8-bit optimizer (bitsandbytes.optim.AdamW8bit), or train adapters (a config whose name ends in _lora)"
    )


def _first_sentences(reason: str) -> str:
    """The start of torch's message: what it tried to allocate, and what the GPU has."""
    return ". ".join(" ".join(reason.split()).split(". ")[:2]).rstrip(".") or "out of memory"
