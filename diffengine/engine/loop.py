"""The training loop: one iteration is one optimizer step.

Its loss is the mean over *all* the step's targets, however they are split over ranks and micro-batches:
counts are added on the host, and each micro-batch back-propagates `loss_sum * world / total` (DDP averages
over ranks). So the split changes nothing but rounding, and a step that runs out of memory is taken again in
smaller parts. A sample with a weight counts that much: sum_i w_i sum_j ce_ij / sum_i w_i n_i.
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

from diffengine import distributed
from diffengine.datasets import Stream, steps_for_epochs
from diffengine.engine.compiling import Compile
from diffengine.engine.micro import MicroBatches, free_memory, out_of_step, too_large
from diffengine.errors import UserError

TRIALS = 2  # steps that several ranks try before they take them


class Interrupted(Exception):
    """Training was asked to stop by a signal; the step was finished and saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


@dataclass
class Step:
    """What one iteration leaves for the hooks; tensors are still on the device.

    Attributes:
        sums: weighted sums over this rank's targets: "loss" and what the model logs.
        targets: this rank's targets, each with its sample's weight, on the host.
        samples: the global batch's samples.
        learning_rate: that this step took.
        grad_norm: before clipping, or None.
        skipped: unreadable images replaced on this rank.
        data_wait: seconds waited for the batch.
        seconds: of the whole iteration on the host, hooks after it apart.
    """

    sums: dict[str, Tensor]
    targets: float
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
            step. Where the memory does not hold so many, it halves.
        tf32: let fp32 matrix products on the GPU use TF32.
        compile: run the model's blocks as `torch.compile` makes them: True, False, or "auto" for where it
            pays within the run. Equal to rounding; dropout draws other numbers, the same in each run.
    """

    def __init__(
        self,
        dataloader: DataLoader,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        micro_batch_size: int | None = None,
        tf32: bool = True,
        compile: Compile = "auto",
    ) -> None:
        super().__init__(None, dataloader)  # the runner comes with `attach`: a loop is checked before a run begins
        self.batch_size: int = dataloader.batch_sampler.batch_size
        self.stream: Stream = dataloader.dataset.stream
        self.num_samples = len(self.stream.dataset)
        self.by_epoch = max_iters is None
        self.interval_unit = "epoch" if self.by_epoch else "iter"
        self.max_iters = count_iters(max_epochs, max_iters, self.num_samples, self.batch_size)
        self.max_epochs: int = self._epochs_at(self.max_iters) if max_epochs is None else max_epochs
        self.micro = MicroBatches(self.batch_size, micro_batch_size)
        self.compile: Compile = compile
        self._unproven = TRIALS if distributed.world_size() > 1 else 0
        self.done = 0  # optimizer steps taken
        self.iter = 0  # mmengine's: the same, but in `after_train_iter` it still names the step just taken
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32

    def attach(self, runner: Any) -> None:
        """Run under this runner."""
        self._runner = runner
        self._buffers = list(runner.trainable.buffers())  # to list them walks all modules

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

    def _step(self, batch: dict[str, Any], total: float) -> Step:
        """One optimizer step over this rank's share of a batch that has `total` weighted targets in all."""
        runner, optim = self.runner, self.runner.optim_wrapper
        scale = distributed.world_size() / total
        sums = self._in_memory(batch, scale)
        rate = optim.optimizer.param_groups[0]["lr"]
        try:
            norm = optim.step()
        except torch.OutOfMemoryError as error:  # its state, which no smaller micro-batch makes smaller
            raise too_large("the optimizer's state does", str(error)) from error
        runner.param_scheduler.step()
        skipped = sum(batch.get("skipped", ()))
        return Step(sums, count_targets(batch), self.batch_size, rate, norm, skipped)

    def _in_memory(self, batch: dict[str, Any], scale: float) -> dict[str, Tensor]:
        """The gradients and sums of a step, in parts that fit into memory on every rank.

        Ranks exchange gradients inside the backward pass, where one that fails leaves the others waiting. So
        on several ranks the first steps of a process are tried without an exchange before they are taken:
        two, since with the first comes the optimizer's state.

        Raises:
            UserError: not even the smallest part fits; or memory ran out on one of several ranks later on.
        """
        several = distributed.world_size() > 1
        if not several or self._unproven:
            sums = self._search(batch, scale, exchange=not several)
            if not several:
                return sums
            self._unproven -= 1
        try:
            return self._accumulate(batch, scale, exchange=True)
        except torch.OutOfMemoryError as error:
            raise out_of_step(distributed.rank(), self.done + 1, self.micro, str(error)) from error

    def _search(self, batch: dict[str, Any], scale: float, exchange: bool) -> dict[str, Tensor]:
        """Try the step, in halves of the micro-batch as long as memory runs out on any rank.

        What fails leaves no trace: no gradients, and buffers as they were.

        Args:
            exchange: take the step with what fits; else leave no trace of that either.
        """
        runner = self.runner
        while True:
            buffers = [(buffer, buffer.clone()) for buffer in self._buffers]
            sums: dict[str, Tensor] = {}
            reason = None
            try:
                sums = self._accumulate(batch, scale, exchange)
            except torch.OutOfMemoryError as error:
                reason = str(error)
            (failed,) = distributed.add_counts(int(reason is not None))
            if exchange and not failed:
                return sums
            runner.optim_wrapper.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            if not failed:
                return sums
            free_memory()
            before_size = self.micro.size
            if not self.micro.halve():
                problem = None if reason is None else self.micro.too_large(reason)
                distributed.share_error(problem)
            runner.logger.info(
                f"out of memory with {before_size} images at a time: step {self.done + 1} is taken again "
                f"with {self.micro.size}, and so are all after it (micro_batch_size)"
            )

    def _accumulate(self, batch: dict[str, Any], scale: float, exchange: bool) -> dict[str, Tensor]:
        """Add up the gradients of all parts; the sums of their losses and of what the model logs.

        Args:
            scale: of the losses' sums.
            exchange: average gradients over ranks with the last part; else leave every rank its own.
        """
        runner, optim = self.runner, self.runner.optim_wrapper
        sums: dict[str, Tensor] = {}
        runner.trainable.before_step(self.iter)
        for index, micro_batch in enumerate(split(batch, self.micro.count)):
            seed_generators(micro_seed(runner.seed, self.iter, index, runner.rank), optim.device)
            with self._sync(exchange and index == self.micro.count - 1):
                prepared = runner.trainable.prepare(micro_batch)
                with optim.autocast():
                    loss_sum, logs = runner.model(prepared)
                optim.backward(loss_sum * scale)
            for name, value in {"loss": loss_sum.detach(), **logs}.items():
                sums[name] = sums[name] + value if name in sums else value
        return sums

    def _sync(self, exchange: bool) -> AbstractContextManager:
        """Whether a backward pass ends in an exchange of gradients between ranks."""
        model = self.runner.model
        apart = isinstance(model, DistributedDataParallel) and not exchange
        return model.no_sync() if apart else nullcontext()


def _next(batches: Iterator[dict[str, Any]], stop: "StopRequest") -> tuple[dict[str, Any], float, int]:
    """This rank's next batch; and of all ranks, in one exchange: the weighted targets, and the signal that
    asks to stop or 0.

    Raises:
        UserError: on every rank, if any rank's data has a problem.
    """
    batch: dict[str, Any] = {"num_targets": ()}
    problem: UserError | None = None
    try:
        batch = next(batches)
    except UserError as error:
        problem = error
    total, asked, problems = distributed.add_counts(
        count_targets(batch), int(stop.signum is not None), int(problem is not None)
    )
    if problems:
        distributed.share_error(problem)
    return batch, total, (stop.signum or signal.SIGTERM) if asked else 0


def count_targets(batch: dict[str, Any]) -> float:
    """Weighted targets of a host batch, sum_i w_i n_i; an exact count where there are no weights."""
    if "weight" not in batch:
        return sum(batch["num_targets"])
    return math.fsum(weight * count for weight, count in zip(batch["weight"], batch["num_targets"]))


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


def split(batch: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The batch in `count` parts of nearly one size, their tensors views of it."""
    if count == 1:
        return [batch]
    rows = len(batch["num_targets"])
    cuts = [rows * index // count for index in range(count + 1)]
    return [{key: value[start:end] for key, value in batch.items()} for start, end in itertools.pairwise(cuts)]


def micro_seed(seed: int, iteration: int, micro_step: int, rank: int) -> int:
    """The seed of what cannot live in a sample (dropout), from where in the run it is drawn."""
    index = struct.pack("<QQQQ", seed, iteration, micro_step, rank)
    return int.from_bytes(hashlib.blake2b(index, digest_size=7).digest(), "little")


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
