"""How many samples one forward pass takes: as configured, or as many as fit into memory."""

import gc
import math
from collections.abc import Callable
from typing import TypeVar, final

import torch

from diffengine import distributed
from diffengine.errors import UserError, require
from diffengine.text import format_bytes

T = TypeVar("T")
Attempt = Callable[[bool], T]
Undo = Callable[[], None]
TRIALS = 2  # steps that several ranks try before they take them


@final
class MicroBatches:
    """The equal micro-batches in which every rank takes its share of a step of `batch_size`. Out of memory, they halve.

    `asked` is the config's `micro_batch_size`, to start with; None for a rank's whole share.
    """

    def __init__(self, batch_size: int, asked: int | None) -> None:
        require(asked is None or asked >= 1, f"micro_batch_size got {asked}; expected at least 1, or None")
        self.asked = asked
        self.found: int | None = None  # the most samples of a micro-batch, once memory ran out
        world = distributed.world_size()
        self._smallest, self._largest = batch_size // world, math.ceil(batch_size / world)  # shares of ranks
        self._untested = TRIALS if world > 1 else 0
        # Micro-batches per step, the same on all ranks: a model may talk to other ranks in `forward`.
        self.count = 1 if asked is None else math.ceil(self._largest / asked)
        given = f"batch_size {batch_size} over {world} processes gives shares of {self._smallest} and"
        unlike = f"{self._smallest + 1}, which micro_batch_size {asked} cannot split alike"
        advice = f"set it to {(asked or 0) + 1}, or batch_size to a multiple of {world}"
        require(self._smallest >= self.count, f"{given} {unlike}; {advice}")

    @property
    def size(self) -> int:
        """Samples of a micro-batch, at most."""
        return math.ceil(self._largest / self.count)

    def fit(self, attempt: Attempt[T], undo: Undo, report: Callable[[str], None], step: int) -> T:
        """Take a step's gradients, in smaller micro-batches as long as memory runs out on any rank.

        Ranks exchange gradients inside the backward pass, and one that fails there leaves the others waiting. So with
        several ranks the first steps of a process are tried without an exchange before they are taken: two steps,
        since the optimizer's state is allocated in the first.

        `attempt` takes them; its argument is whether ranks exchange them. `undo` undoes an attempt.
        """
        if distributed.world_size() == 1:
            return self._search(attempt, undo, report, step, exchange=True)
        if self._untested:
            self._search(attempt, undo, report, step, exchange=False)
            self._untested -= 1
        try:
            return attempt(True)
        except torch.OutOfMemoryError as error:  # in the middle of an exchange, which cannot be repeated
            rank, reason, smaller = distributed.rank(), _first_sentences(str(error)), max(1, self.size // 2)
            raise UserError(
                f"process {rank} ran out of memory in step {step} ({reason}), after {self.size} images at a time had "
                f"fitted; continue with --resume --cfg-options micro_batch_size={smaller}"
            ) from error

    def _search(self, attempt: Attempt[T], undo: Undo, report: Callable[[str], None], step: int, exchange: bool) -> T:
        """The first attempt that fits on all ranks; it is undone as well if it was one without an exchange."""
        while True:
            reason, result = None, None
            try:
                result = attempt(exchange)
            except torch.OutOfMemoryError as error:
                reason = str(error)
            (failed,) = distributed.add_counts(int(reason is not None))
            if failed or not exchange:
                undo()
            if not failed:
                return result  # type: ignore[return-value]
            gc.collect()  # reference cycles of the failed attempt hold memory
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            sizes = f"with {self.size} images at a time"
            if not self.halve():
                distributed.share_error(None if reason is None else self.too_large(reason))
            again = f"step {step} is taken again with {self.size}, and so are all after it (micro_batch_size)"
            report(f"out of memory {sizes}: {again}")

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
        if state and state["found"] and state["asked"] == self.asked:
            self.found = state["found"]
            self.count = max(self.count, min(math.ceil(self._largest / self.found), self._smallest))


def too_large(what: str, reason: str) -> UserError:
    """The error if `what` ("X does", "X do") does not fit into memory; `reason` is torch's message."""
    device = ""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        used = format_bytes(torch.cuda.max_memory_allocated())
        device = f"; {used} were in use at most, the GPU has {format_bytes(total)} ({format_bytes(free)} free)"
    return UserError(
        f"{what} not fit into memory ({_first_sentences(reason)}){device}: set --cfg-options "
        "model.gradient_checkpointing=True, "
        "take an 8-bit optimizer (bitsandbytes.optim.AdamW8bit), or train adapters (a config whose name ends in _lora)"
    )


def _first_sentences(reason: str) -> str:
    """The start of torch's message: what it tried to allocate, and what the GPU has."""
    return ". ".join(" ".join(reason.split()).split(". ")[:2]).rstrip(".") or "out of memory"
