"""The training loop: one iteration is one optimizer step.

Its loss is the mean over *all* the step's targets, however they are split over ranks and micro-batches:
counts are added on the host, and each micro-batch back-propagates `loss_sum * world / total` (DDP averages
over ranks). So the split changes nothing but rounding.
"""

import hashlib
import itertools
import math
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

from diffengine.datasets import Stream, steps_for_epochs
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
        learning_rate: that this step took.
        grad_norm: before clipping, or None.
        skipped: unreadable pictures replaced on this rank.
        data_wait: seconds waited for the batch.
        seconds: of the whole iteration on the host, hooks after it apart.
    """

    sums: dict[str, Tensor]
    targets: int
    samples: int
    learning_rate: float
    grad_norm: Tensor | None
    skipped: int
    data_wait: float = 0.0
    seconds: float = 0.0


@final
class StepLoop(BaseLoop):
    """Runs optimizer steps over the stream of positions. The `train_cfg` section.

    Args:
        dataloader: given by the run.
        max_epochs: passes over the data; or
        max_iters: optimizer steps. One of the two; hooks' intervals count in the same unit.
        micro_batch_size: samples per forward on one device, at most; None for a rank's whole share of the
            step.
        tf32: let fp32 matrix products on the GPU use TF32.
    """

    def __init__(
        self,
        dataloader: DataLoader,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        micro_batch_size: int | None = None,
        tf32: bool = True,
    ) -> None:
        super().__init__(
            None, dataloader
        )  # the runner comes with `attach`: a loop is checked before a run begins
        self.batch_size: int = dataloader.batch_sampler.batch_size
        self.stream: Stream = dataloader.dataset.stream
        self.num_samples = len(self.stream.dataset)
        self.by_epoch = max_iters is None
        self.interval_unit = "epoch" if self.by_epoch else "iter"
        self.max_iters = count_iters(max_epochs, max_iters, self.num_samples, self.batch_size)
        self.max_epochs: int = self._epochs_at(self.max_iters) if max_epochs is None else max_epochs
        self.num_micro_batches = count_micro_batches(self.batch_size, micro_batch_size)
        self.done = 0  # optimizer steps taken
        self.iter = 0  # mmengine's: the same, but in `after_train_iter` it still names the step just taken
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32

    def attach(self, runner: Any) -> None:
        """Run under this runner."""
        self._runner = runner

    # ---------------------------------------------------------------------------------------- where it stands

    def _epochs_at(self, iteration: int) -> int:
        """Passes over the data completed after this many steps.

        Epoch e ends with the first step that reaches (e + 1) * N positions. The last step of a run that
        counts epochs may reach further, and counts no more.
        """
        passes = iteration * self.batch_size // self.num_samples
        return min(passes, self.max_epochs) if self.by_epoch else passes

    @property
    def epochs_done(self) -> int:
        """Passes over the data completed."""
        return self._epochs_at(self.done)

    @property
    def epoch(self) -> int:
        """mmengine's: as `epochs_done`, but in `after_train_epoch` still names the epoch just completed."""
        return self._epochs_at(self.iter)

    @property
    def ends_epoch(self) -> bool:
        """Whether the step just taken completed a pass over the data."""
        return self.done > 0 and self.epochs_done > self._epochs_at(self.done - 1)

    def start_at(self, done: int) -> None:
        """Go on after this many steps."""
        self.done = self.iter = done

    def due(self, every: int | None) -> bool:
        """Whether the step just taken completed another `every` epochs or steps, as the config counts."""
        if not every:
            return False
        if not self.by_epoch:
            return self.done % every == 0
        return self.epochs_done // every > self._epochs_at(self.done - 1) // every

    @property
    def name(self) -> str:
        """What a checkpoint of now is called: `epoch_N` at the end of an epoch that counts, else `iter_N`."""
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
            signum = self._steps(stop)
            if signum:
                runner.call_hook("on_interrupt")
                raise Interrupted(signum)
        runner.call_hook("after_train")
        return runner.model

    def _steps(self, stop: "StopRequest") -> int:
        """Step until the end, or until any rank is asked to stop: then the signal's number, else 0."""
        runner = self.runner
        batches = iter(self.dataloader)
        runner.call_hook("before_train_epoch")
        try:
            while self.done < self.max_iters:
                started = time.perf_counter()
                batch, total, signum = _next(batches, stop)
                if signum:
                    return signum
                fetched = time.perf_counter()
                runner.call_hook("before_train_iter", batch_idx=self.iter, data_batch=batch)
                step = self._step(batch, total)
                step.data_wait, step.seconds = fetched - started, time.perf_counter() - started
                self.done += 1
                runner.call_hook("after_train_iter", batch_idx=self.iter, data_batch=batch, outputs=step)
                if self.ends_epoch:
                    runner.call_hook("after_train_epoch")
                self.iter = self.done
                if self.ends_epoch and self.done < self.max_iters:
                    runner.call_hook("before_train_epoch")
        finally:
            batches.close()  # a generator: its workers end now
        return 0

    def _step(self, batch: dict[str, Any], total: int) -> Step:
        """One optimizer step over this rank's share of a batch with `total` targets on all ranks together."""
        runner, optim = self.runner, self.runner.optim_wrapper
        scale = distributed.world_size() / total
        micro_batches = split(batch, self.num_micro_batches)
        sums: dict[str, Tensor] = {}
        runner.trainable.before_step(self.iter)
        for place, micro_batch in enumerate(micro_batches):
            seed_generators(micro_seed(runner.seed, self.iter, place, runner.rank), optim.device)
            with self._sync(last=place == len(micro_batches) - 1):
                prepared = runner.trainable.prepare(micro_batch)
                with optim.autocast():
                    loss_sum, logs = runner.model(prepared)
                optim.backward(loss_sum * scale)
            for name, value in {"loss": loss_sum.detach(), **logs}.items():
                sums[name] = sums[name] + value if name in sums else value
        rate = optim.optimizer.param_groups[0]["lr"]
        norm = optim.step()
        runner.param_scheduler.step()
        targets, skipped = sum(batch["num_targets"]), sum(batch.get("skipped", ()))
        return Step(sums, targets, self.batch_size, rate, norm, skipped)

    def _sync(self, last: bool) -> AbstractContextManager:
        """Gradients are exchanged between ranks with the last micro-batch only."""
        model = self.runner.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def _next(batches: Iterator[dict[str, Any]], stop: "StopRequest") -> tuple[dict[str, Any], int, int]:
    """This rank's next batch; and of all ranks, in one exchange: the targets, and the signal that asks to
    stop or 0.

    Raises:
        UserError: on every rank, if any rank's data has a fault.
    """
    batch: dict[str, Any] = {"num_targets": ()}
    fault: UserError | None = None
    try:
        batch = next(batches)
    except UserError as error:
        fault = error
    total, asked, faults = distributed.add_counts(
        sum(batch["num_targets"]), int(stop.signum is not None), int(fault is not None)
    )
    if faults:
        distributed.share_fault(fault)
    return batch, total, (stop.signum or signal.SIGTERM) if asked else 0


def count_iters(max_epochs: int | None, max_iters: int | None, num_samples: int, batch_size: int) -> int:
    """Optimizer steps of a run: ceil(epochs * N / G), or as given.

    Raises:
        UserError: not exactly one of the two is given, or it is below 1.
    """
    if (max_epochs is None) == (max_iters is None):
        raise UserError(
            f"got max_epochs={max_epochs} and max_iters={max_iters}; expected one of them: set the other to "
            "None"
        )
    for name, value in (("max_epochs", max_epochs), ("max_iters", max_iters)):
        if value is not None and value < 1:
            raise UserError(f"{name} got {value}; expected at least 1")
    if max_iters is not None:
        return max_iters
    assert max_epochs is not None
    return steps_for_epochs(max_epochs, num_samples, batch_size)


def count_micro_batches(batch_size: int, micro_batch_size: int | None) -> int:
    """Micro-batches per step, the same on all ranks: a model may talk to other ranks in `forward`.

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


def split(batch: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The batch in `count` parts of nearly one size, their tensors views of it."""
    rows = len(batch["num_targets"])
    cuts = [rows * place // count for place in range(count + 1)]
    return [
        {key: value[start:end] for key, value in batch.items()} for start, end in itertools.pairwise(cuts)
    ]


def micro_seed(seed: int, iteration: int, micro_step: int, rank: int) -> int:
    """The seed of what cannot live in a sample (dropout), from where in the run it is drawn."""
    place = struct.pack("<QQQQ", seed, iteration, micro_step, rank)
    return int.from_bytes(hashlib.blake2b(place, digest_size=7).digest(), "little")


def seed_generators(seed: int, device: torch.device) -> None:
    """As torch.manual_seed, but for this device alone: that one takes 1 ms for kinds that are absent."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)


@dataclass
class StopRequest:
    """The signal that asked training to stop, if one did."""

    signum: int | None = None
    at: float = 0.0


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Take SIGINT and SIGTERM as requests; a second signal, a second later or more, stops at once.

    (torchrun passes on a Ctrl-C that its processes have had already, within milliseconds: that is one
    request.)
    """
    stop = StopRequest()

    def note(signum: int, frame: FrameType | None) -> None:
        if stop.signum is None:
            stop.signum, stop.at = signum, time.monotonic()
        elif time.monotonic() - stop.at >= 1:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + signum)

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
