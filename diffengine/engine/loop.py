"""The training loop: one iteration is one optimizer step.

The loss of a step is the mean over *all* its targets, however they are split over ranks and micro-batches: counts are
summed on the host, and each micro-batch back-propagates `loss_sum * world / total` (DDP averages over ranks). So the
split changes nothing but rounding, and a step that runs out of memory is taken again in smaller micro-batches. A sample
with a weight w_i counts that much: sum_i w_i sum_j ce_ij / sum_i w_i n_i. In data with masks so does a token, by m_ij:
sum_i w_i sum_j m_ij ce_ij / sum_i w_i sum_j m_ij. A step in which all of them are 0 has gradients of 0.

A step whose loss or gradients are not finite is bad. It changes no weight and no state, and counts as any other.
"""

import hashlib
import itertools
import math
import signal
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from diffengine import distributed
from diffengine.datasets import Stream, batches_of, micro_batches
from diffengine.engine.clock import Clock
from diffengine.engine.compiling import Compile
from diffengine.engine.micro import MicroBatches, too_large
from diffengine.engine.mmengine_seam import BaseLoop
from diffengine.engine.step import Step
from diffengine.errors import Interrupted, UserError

if TYPE_CHECKING:
    from diffengine.engine.run import Run


@final
class StepLoop(BaseLoop):
    """Takes optimizer steps over the stream of positions. The `train_cfg` section.

    Args:
        max_epochs: passes over the data; or
        max_iters: optimizer steps. One of the two; hooks' intervals count in the same unit.
        micro_batch_size: the most samples per forward pass on one device; None for a rank's whole share of the step.
            If memory runs out, it halves.
        tf32: let fp32 matrix products on the GPU use TF32.
        compile: run the model's blocks compiled by `torch.compile`: True, False, or "auto" if it pays within the run.
            Equal to rounding; dropout draws other numbers, the same in each run.
        dataloader: given by the run.
    """

    def __init__(
        self,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        micro_batch_size: int | None = None,
        tf32: bool = True,
        compile: Compile = "auto",
        *,
        dataloader: DataLoader,
    ) -> None:
        super().__init__(None, dataloader)  # the runner is given to `run`
        self.batch_size: int = dataloader.batch_sampler.batch_size
        self.stream: Stream = dataloader.dataset.stream
        self.clock = Clock(max_epochs, max_iters, len(self.stream), self.batch_size)
        self.micro = MicroBatches(self.batch_size, micro_batch_size)
        self.compile: Compile = compile
        self.iter = 0  # for mmengine: clock.done; in `after_train_iter` and `_epoch`, the index of the step just taken
        self.max_epochs, self.max_iters = self.clock.max_epochs, self.clock.max_iters  # mmengine's
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32

    @property
    def epoch(self) -> int:
        """For mmengine: epochs completed; in `after_train_epoch`, the index of the epoch just completed."""
        return self.clock.epochs_at(self.iter)

    def start_at(self, done: int) -> None:
        """Continue after so many steps."""
        self.clock.done = self.iter = done

    def run(self, run: "Run", steps: int | None = None, synchronize: bool = False) -> Step | None:
        """Take steps to the end, or so many and without the hooks' `after_train`; return the last one.

        A signal raises Interrupted, once the step is finished and hooks' `on_interrupt` has run.
        """
        self._runner, clock, step = run, self.clock, None
        modules = [module for module in run.trainable.modules() if module.training]  # those of others do not change
        self._buffers = [buffer for module in modules for buffer in module.buffers(recurse=False)]
        self._now = _synchronized_clock if synchronize and torch.cuda.is_available() else time.perf_counter
        end = self.max_iters if steps is None else min(self.max_iters, clock.done + steps)
        run.call_hook("before_train")
        with stop_signals() as stop, closing(batches_of(self.dataloader)) as batches:
            run.call_hook("before_train_epoch")
            while clock.done < end and not clock.finished:
                started = self._now()
                batch, total, signum = _next(batches, stop)
                if signum:
                    batches.close()  # a generator: its workers end with it
                    run.call_hook("on_interrupt")
                    raise Interrupted(signum)
                self._seconds = {"data": self._now() - started, "prepare": 0.0, "forward_backward": 0.0}
                run.call_hook("before_train_iter", batch_idx=self.iter, data_batch=batch)
                step = self.step(run, batch, total)
                step.seconds["all"] = self._now() - started
                clock.done += 1
                run.call_hook("after_train_iter", batch_idx=self.iter, data_batch=batch, outputs=step)
                if clock.ends_epoch:
                    run.call_hook("after_train_epoch")
                self.iter = clock.done
                if clock.ends_epoch and not clock.finished:
                    run.call_hook("before_train_epoch")
        if steps is None:
            run.call_hook("after_train")
        return step

    def step(self, run: "Run", batch: dict[str, Any], total: float) -> Step:
        """Take one optimizer step over this rank's share of a batch that has `total` weighted targets on all ranks."""
        optim, scale = run.optim_wrapper, distributed.world_size() / total if total else 0.0
        buffers = [buffer.clone() for buffer in self._buffers]

        def accumulate(exchange: bool) -> dict[str, Tensor]:
            sums: dict[str, Tensor] = {}
            run.trainable.before_step(self.iter)
            chunks = micro_batches(batch, self.micro.count)
            with optim.cast_weights():
                for index, micro_batch in enumerate(chunks):
                    seed_generators(micro_seed(run.seed, self.iter, index, run.rank), optim.device)
                    last = exchange and index == len(chunks) - 1  # DDP averages gradients in this micro-batch
                    skip_sync = isinstance(run.model, DistributedDataParallel) and not last
                    with run.model.no_sync() if skip_sync else nullcontext():
                        logs = self._forward_backward(run, micro_batch, scale)
                    for name, value in logs.items():
                        sums[name] = sums[name] + value if name in sums else value
            return sums

        def undo() -> None:
            optim.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, before in zip(self._buffers, buffers):
                    buffer.copy_(before)

        sums = self.micro.fit(accumulate, undo, run.logger.info, self.clock.done + 1)
        run.trainable.after_passes()
        learning_rate, started = optim.optimizer.param_groups[0]["lr"], self._now()
        try:
            norms = optim.step()  # clip, step, clear the gradients
        except torch.OutOfMemoryError as error:  # the optimizer's state, which no smaller micro-batch makes smaller
            raise too_large("the optimizer's state does", str(error)) from error
        run.param_scheduler.step()
        for buffer, before in zip(self._buffers, buffers):
            buffer.copy_(torch.where(norms.good, buffer, before))
        self._seconds["optimizer"] = self._now() - started
        return Step(
            ~norms.good, sums, count_targets(batch), targets_by(batch, "bucket"), targets_by(batch, "source"),
            sum(batch.get("num_tokens", ())), sum(batch.get("caption_dropped", ())), self.batch_size, learning_rate,
            norms.total, norms.groups, sum(batch.get("skipped", ())), self._seconds,
            list(itertools.chain.from_iterable(batch.get("skipped_names", ()))),
        )  # fmt: skip

    def _forward_backward(self, run: "Run", micro_batch: dict[str, Any], scale: float) -> dict[str, Tensor]:
        """Add the gradients of `scale` times a micro-batch's loss; return the sums of its loss and logs."""
        started = self._now()
        prepared = run.trainable.prepare(micro_batch)
        ready = self._now()
        with run.optim_wrapper.autocast():
            loss_sum, logs = run.model(prepared)
        run.optim_wrapper.backward(loss_sum * scale)
        self._seconds["prepare"] += ready - started
        self._seconds["forward_backward"] += self._now() - ready
        return {"loss": loss_sum.detach(), **logs}


def _synchronized_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _next(batches: Iterator[dict[str, Any]], stop: SimpleNamespace) -> tuple[dict[str, Any], float, int]:
    """(this rank's next batch, all ranks' weighted targets, the signal that asks any rank to stop or 0).

    An error in any rank's data is raised on all. One exchange between ranks does all of this.
    """
    batch: dict[str, Any] = {"num_targets": ()}
    error: UserError | None = None
    try:
        batch = next(batches)
    except UserError as caught:
        error = caught
    total, asked, errors = distributed.add_counts(count_targets(batch), stop.signum is not None, error is not None)
    if errors:
        distributed.share_error(error)
    return batch, total, (stop.signum or signal.SIGTERM) if asked else 0


def count_targets(batch: dict[str, Any]) -> float:
    """Weighted targets of a host batch, sum_i w_i n_i; an exact count if there are no weights."""
    if "weight" not in batch:
        return sum(batch["num_targets"])
    return math.fsum(weight * count for weight, count in zip(batch["weight"], batch["num_targets"]))


def targets_by(batch: dict[str, Any], key: Literal["bucket", "source"]) -> dict[int, float]:
    """Weighted targets of a host batch by the bucket or the source of their sample; {} if samples have none."""
    found: dict[int, float] = defaultdict(int)
    weights = batch.get("weight") or itertools.repeat(1)
    for value, weight, count in zip(batch.get(key, ()), weights, batch["num_targets"]):
        found[value if key == "bucket" else int(value.argmax())] += weight * count
    return found


def micro_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """The seed for what cannot live in a sample (dropout inside the model)."""
    words = struct.pack("<QQQQ", seed, step, micro_step, rank)
    return int.from_bytes(hashlib.blake2b(words, digest_size=7).digest(), "little")


def seed_generators(seed: int, device: torch.device) -> None:
    """Like torch.manual_seed, but only for the CPU and this device; the original spends 1 ms on absent devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)


@contextmanager
def stop_signals() -> Iterator[SimpleNamespace]:
    """Take SIGINT and SIGTERM as requests: yields `signum`, None until one comes, and the time `at` which it came.

    A second signal stops at once if it comes a second later or more: torchrun repeats a Ctrl-C within milliseconds.
    """
    stop = SimpleNamespace(signum=None, at=0.0)

    def note(signum: int, frame: Any) -> None:
        if stop.signum is None:
            stop.signum, stop.at = signum, time.monotonic()
        elif time.monotonic() - stop.at >= 1:
            raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
