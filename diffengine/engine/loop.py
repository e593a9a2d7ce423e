"""The training loop: one iteration is one optimizer step.

Its loss is the mean over *all* the step's targets, however they are split over ranks and micro-batches: counts are
added on the host, and each micro-batch back-propagates `loss_sum * world / total` (DDP averages over ranks). So the
split changes nothing but rounding.
"""

import hashlib
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, final

import torch
from mmengine.runner import BaseLoop
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from diffengine.datasets import split, steps_for_epochs
from diffengine.engine import distributed
from diffengine.errors import UserError


class Interrupted(Exception):
    """Training was asked to stop by a signal; the step was finished and saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


@dataclass
class Step:
    """What one iteration leaves for the hooks; tensors are still on the device.

    Attributes:
        sums: sums over this rank's targets: "loss" and what the model logs.
        targets: this rank's targets, on the host.
        samples: the global batch's samples.
        grad_norm: before clipping, or None.
        skipped: unreadable pictures replaced on this rank.
        data_wait: seconds waited for the batch.
        seconds: of the whole iteration on the host, hooks after it apart.
    """

    sums: dict[str, Tensor]
    targets: int
    samples: int
    grad_norm: Tensor | None
    skipped: int
    data_wait: float = 0.0
    seconds: float = 0.0


@final
class StepLoop(BaseLoop):
    """Runs optimizer steps over the stream of positions. The `train_cfg` section.

    Args:
        runner, dataloader: given by the run.
        max_epochs: passes over the data; or
        max_iters: optimizer steps. One of the two; hooks' intervals count in the same unit.
        micro_batch_size: samples per forward on one device; None for a rank's whole share of the step.
        tf32: let fp32 matrix products on the GPU use TF32.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: DataLoader,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        micro_batch_size: int | None = None,
        tf32: bool = True,
    ) -> None:
        super().__init__(runner, dataloader)
        sampler = dataloader.batch_sampler
        self.batch_size: int = sampler.batch_size
        self.num_samples = len(dataloader.dataset.stream.dataset)
        self.by_epoch = max_iters is None
        self.interval_unit = "epoch" if self.by_epoch else "iter"
        self.max_iters = count_iters(max_epochs, max_iters, self.num_samples, self.batch_size)
        self.max_epochs = max_epochs if max_epochs is not None else self._epochs_at(self.max_iters)
        if micro_batch_size is not None and micro_batch_size < 1:
            raise UserError(f"micro_batch_size got {micro_batch_size}; expected at least 1, or None")
        self.micro_batch_size = micro_batch_size
        self.done = 0  # optimizer steps taken
        self.iter = 0  # mmengine's: the same, but in `after_train_iter` it still names the step just taken
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32

    # ------------------------------------------------------------------------------------------ where it stands

    def _epochs_at(self, iteration: int) -> int:
        """Passes over the data completed after this many steps: epoch e ends with the first step that reaches
        (e + 1) * N positions."""
        return iteration * self.batch_size // self.num_samples

    @property
    def epochs_done(self) -> int:
        """Passes over the data completed."""
        return self._epochs_at(self.done)

    @property
    def epoch(self) -> int:
        """mmengine's: as `epochs_done`, but in `after_train_epoch` it still names the epoch just completed."""
        return self._epochs_at(self.iter)

    @property
    def ends_epoch(self) -> bool:
        """Whether the step just taken completed a pass over the data."""
        return self.done > 0 and self.epochs_done > self._epochs_at(self.done - 1)

    def start_at(self, done: int) -> None:
        """Go on after this many steps."""
        self.done = self.iter = done

    def due(self, every: int | None) -> bool:
        """Whether the step just taken completed another `every` epochs or steps, in the unit the config counts."""
        if not every:
            return False
        if not self.by_epoch:
            return self.done % every == 0
        return self.epochs_done // every > self._epochs_at(self.done - 1) // every

    @property
    def name(self) -> str:
        """What a checkpoint of this moment is called: `epoch_N` at an epoch's end where epochs count, else `iter_N`."""
        return f"epoch_{self.epochs_done}" if self.by_epoch and self.ends_epoch else f"iter_{self.done}"

    # ------------------------------------------------------------------------------------------ running

    def run(self) -> Any:
        """Train to the end, or until a signal asks to stop.

        Raises:
            Interrupted: a signal came; the step was finished, and hooks' `on_interrupt` has run.
        """
        runner = self.runner
        runner.call_hook("before_train")
        with stop_signals() as stop:
            self._steps(stop)
            if stop.signum is not None:
                runner.call_hook("on_interrupt")
                raise Interrupted(stop.signum)
        runner.call_hook("after_train")
        return runner.model

    def _steps(self, stop: "StopRequest") -> None:
        runner = self.runner
        batches = iter(self.dataloader)
        runner.call_hook("before_train_epoch")
        while self.done < self.max_iters:
            started = time.perf_counter()
            batch = next(batches)
            fetched = time.perf_counter()
            runner.call_hook("before_train_iter", batch_idx=self.iter, data_batch=batch)
            step, asked = self._step(batch, stop)
            step.data_wait, step.seconds = fetched - started, time.perf_counter() - started
            self.done += 1
            runner.call_hook("after_train_iter", batch_idx=self.iter, data_batch=batch, outputs=step)
            if self.ends_epoch:
                runner.call_hook("after_train_epoch")
            self.iter = self.done
            if asked:
                return
            if self.ends_epoch and self.done < self.max_iters:
                runner.call_hook("before_train_epoch")

    def _step(self, batch: dict[str, Any], stop: "StopRequest") -> tuple[Step, bool]:
        """One optimizer step over this rank's share; also whether any rank was asked to stop before it."""
        runner, optim = self.runner, self.runner.optim_wrapper
        targets = sum(batch["num_targets"])
        total, asked = distributed.add_counts(targets, stop.signum or 0)
        if asked and stop.signum is None:
            stop.signum = signal.SIGTERM  # another rank was asked; all finish the same step
        world = distributed.world_size()
        micro_batches = split(batch, self.micro_batch_size)
        sums: dict[str, Tensor] = {}
        for place, micro_batch in enumerate(micro_batches):
            torch.manual_seed(micro_seed(runner.seed, self.iter, place, runner.rank))
            last = place == len(micro_batches) - 1
            with self._sync(last):
                prepared = runner.trainable.prepare(micro_batch)
                with optim.autocast():
                    loss_sum, logs = runner.model(prepared)
                optim.backward(loss_sum * (world / total))
            for name, value in {"loss": loss_sum.detach(), **logs}.items():
                sums[name] = sums[name] + value if name in sums else value
        norm = optim.step()
        runner.param_scheduler.step()
        runner.trainable.after_step(self.iter)
        step = Step(sums, targets, self.batch_size, norm, skipped=sum(batch.get("skipped", ())))
        return step, bool(asked) or stop.signum is not None

    def _sync(self, last: bool) -> AbstractContextManager:
        """Gradients are exchanged between ranks with the last micro-batch only."""
        model = self.runner.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def count_iters(max_epochs: int | None, max_iters: int | None, num_samples: int, batch_size: int) -> int:
    """Optimizer steps of a run: ceil(epochs * N / G), or as given.

    Raises:
        UserError: not exactly one of the two is given, or it is below 1.
    """
    if (max_epochs is None) == (max_iters is None):
        raise UserError(
            f"got max_epochs={max_epochs} and max_iters={max_iters}; expected one of them: set the other to None"
        )
    for name, value in (("max_epochs", max_epochs), ("max_iters", max_iters)):
        if value is not None and value < 1:
            raise UserError(f"{name} got {value}; expected at least 1")
    if max_iters is not None:
        return max_iters
    assert max_epochs is not None
    return steps_for_epochs(max_epochs, num_samples, batch_size)


def micro_seed(seed: int, iteration: int, micro_step: int, rank: int) -> int:
    """The seed of what cannot live in a sample (dropout), from where in the run it is drawn."""
    place = struct.pack("<QQQQ", seed, iteration, micro_step, rank)
    return int.from_bytes(hashlib.blake2b(place, digest_size=7).digest(), "little")


@dataclass
class StopRequest:
    """The signal that asked training to stop, if one did."""

    signum: int | None = None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Take SIGINT and SIGTERM as requests; a second signal stops at once."""
    stop = StopRequest()
    signals = (signal.SIGINT, signal.SIGTERM)

    def note(signum: int, frame: FrameType | None) -> None:
        if stop.signum is not None:
            raise KeyboardInterrupt
        stop.signum = signum

    before = {signum: signal.signal(signum, note) for signum in signals}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
