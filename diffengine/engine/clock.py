"""Where a run stands: steps taken, epochs completed, and what is due."""

from typing import final

from diffengine.datasets import steps_for_epochs
from diffengine.errors import require

LARGEST = 10**9  # steps or epochs


@final
class Clock:
    """Counts optimizer steps, and epochs by the positions that they took.

    Epoch e ends with the first step that reaches (e + 1) * num_samples positions. The last step of a run that counts
    epochs may reach further, and counts no more. One of `max_epochs` and `max_iters` is given: hooks' intervals count
    in its unit. `batch_size` is that of all ranks together.
    """

    def __init__(self, max_epochs: int | None, max_iters: int | None, num_samples: int, batch_size: int) -> None:
        both = f"max_epochs={max_epochs} and max_iters={max_iters}"
        require((max_epochs is None) != (max_iters is None), f"got {both}; expected one of them: set the other to None")
        for name, value in (("max_epochs", max_epochs), ("max_iters", max_iters)):
            require(value is None or value >= 1, f"{name} got {value}; expected at least 1")
            require(value is None or value <= LARGEST, f"{name} got {value}; expected {LARGEST:,} at most")
        self.num_samples, self.batch_size = num_samples, batch_size
        self.done = 0  # optimizer steps taken
        self._stopped = False
        self.by_epoch = max_epochs is not None
        self.max_iters = max_iters or steps_for_epochs(max_epochs, num_samples, batch_size)  # type: ignore[arg-type]
        self.max_epochs = max_epochs or self.epochs_at(self.max_iters)

    def epochs_at(self, step: int) -> int:
        """Epochs completed after so many steps."""
        epochs = step * self.batch_size // self.num_samples
        return min(epochs, self.max_epochs) if self.by_epoch else epochs

    @property
    def epochs_done(self) -> int:
        return self.epochs_at(self.done)

    @property
    def finished(self) -> bool:
        """Whether the last step was taken."""
        return self._stopped or self.done >= self.max_iters

    @property
    def ends_epoch(self) -> bool:
        """Whether the last step taken completed an epoch."""
        return self.done > 0 and self.epochs_done > self.epochs_at(self.done - 1)

    def due(self, every: int | None) -> bool:
        """Whether the last step taken completed another `every` epochs or steps, in the unit that the config counts."""
        if not every:
            return False
        if not self.by_epoch:
            return self.done % every == 0
        return self.epochs_done // every > self.epochs_at(self.done - 1) // every

    def next_due(self, every: int | None) -> int:
        """The next step after which `every` so many epochs or steps are due, or the last step if it comes before."""
        if not every:
            return self.max_iters
        units = ((self.epochs_done if self.by_epoch else self.done) // every + 1) * every
        step = steps_for_epochs(units, self.num_samples, self.batch_size) if self.by_epoch else units
        return min(step, self.max_iters)

    def stop(self) -> None:
        """Make the step just taken the last one."""
        self._stopped = True

    def times_due(self, every: int | None) -> int:
        """How often in the whole run something is done that is due `every` so often, and at the end."""
        length = self.max_epochs if self.by_epoch else self.max_iters
        return -(-length // every) if every else 1

    @property
    def checkpoint_name(self) -> str:
        """`epoch_N` at the end of an epoch if the config counts epochs, else `iter_N`."""
        return f"epoch_{self.epochs_done}" if self.by_epoch and self.ends_epoch else f"iter_{self.done}"
