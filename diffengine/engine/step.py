"""What a step leaves, and what the steps since the last log line add up to."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from diffengine import distributed

BAD, GRAD_NORM, GRAD_NORM_GROUPS = "bad", "grad_norm", "grad_norm by group"
BY_SOURCE = "loss_by_source"
COUNTS = ("targets", "tokens", "captions_dropped", "skipped")  # of a step, on the host
STACKED = 256  # steps whose numbers are kept as they come before they are added up over ranks


@dataclass
class Step:
    """What one optimizer step leaves for the hooks. Tensors are still on the device.

    Sums and norms of a bad step may not be finite.
    """

    bad: Tensor  # whether loss or gradients were not finite, and so the step was skipped; equal on all ranks
    sums: dict[str, Tensor]  # weighted sums over this rank's targets: "loss" and what the model logs; see its `forward`
    targets: float  # this rank's, each with its sample's weight, on the host
    bucket_targets: dict[int, float]  # `targets` by the bucket of their sample; {} if samples have none
    source_targets: dict[int, float]  # the same by source, if there are several
    tokens: int  # of this rank's images, masked or not; 0 for a model that learns from pixels
    captions_dropped: int  # on this rank
    samples: int  # of all ranks together
    learning_rate: float  # of this step
    grad_norm: Tensor  # before clipping
    group_norms: Tensor | None  # (groups,), of the optimizer wrapper's `groups`; None if there is one
    skipped: int  # unreadable images replaced on this rank
    seconds: dict[str, float]  # on the host: "data" (the wait), "prepare", "forward_backward", "optimizer" and "all"
    skipped_names: list[str]  # of the images skipped on this rank


class Totals(NamedTuple):
    """What the steps of a window add up to, on all ranks."""

    bad: list[bool]  # by step
    norms: dict[str, list[float]]  # means over the steps that were not bad: of all gradients, and by group
    sums: dict[str, list[float]]  # of `Step.sums`, without bad steps
    counts: dict[str, float]  # COUNTS; `targets` without bad steps
    bucket_targets: list[float]  # the same by bucket
    source_targets: list[float]  # and by source


@final
class Window:
    """The steps since the last line: one row of numbers each, already added up over ranks.

    So a line's numbers do not depend on where a run was resumed. `widths` has the names of the device's columns, and
    how many each has: `bad` and norms, which are equal on all ranks, then the step's sums. A host row has COUNTS, and
    the targets by bucket and by source.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bad_in_a_row = 0  # the bad steps up to the last line
        self.clear()

    def clear(self) -> None:
        """Start the window of the next line."""
        self.widths: dict[str, int] = {}
        self._pending: list[tuple[list[Tensor], list[float]]] = []  # of this rank, not yet added up
        self._rows: list[Tensor] = []  # (steps, sum of widths) fp32 on the device
        self._counts: list[list[float]] = []
        self.seconds = self.waited = 0.0  # on this rank: of all steps, and those that waited for data

    def __len__(self) -> int:
        return len(self._pending) + len(self._counts)

    def add(self, step: Step) -> None:
        """Append a step, on every rank."""
        norms = {BAD: step.bad, GRAD_NORM: step.grad_norm}
        if step.group_norms is not None:
            norms[GRAD_NORM_GROUPS] = step.group_norms
        numbers = norms | step.sums
        if not self._pending:
            widths = {name: value.numel() for name, value in numbers.items()}
            if widths != self.widths:  # also if a resumed checkpoint is of a version that logged other numbers
                self.clear()
                self.widths = widths
        counts = [getattr(step, name) for name in COUNTS]
        counts += [step.bucket_targets.get(index, 0) for index in range(self._num_buckets)]
        counts += [step.source_targets.get(index, 0) for index in range(self.widths.get(BY_SOURCE, 0))]
        self._pending.append((list(numbers.values()), counts))
        self.waited += step.seconds["data"]
        self.seconds += step.seconds["all"]
        if len(self._pending) == STACKED:
            self._fold()

    @property
    def _num_buckets(self) -> int:
        others = (BAD, GRAD_NORM, GRAD_NORM_GROUPS, BY_SOURCE)
        return max((width for name, width in self.widths.items() if name not in others), default=0)

    def _fold(self) -> None:
        """Add the pending rows up over ranks."""
        if not self._pending:
            return
        columns = [torch.stack(column).float() for column in zip(*(values for values, _ in self._pending))]
        columns = [column.reshape(len(column), -1) for column in columns]
        first = sum(name in (BAD, GRAD_NORM, GRAD_NORM_GROUPS) for name in self.widths)
        norms, sums = torch.cat(columns[:first], dim=1), torch.cat(columns[first:], dim=1)
        if distributed.world_size() > 1:
            dist.all_reduce(sums)
        counts = np.array([counts for _, counts in self._pending])
        counts = np.reshape(distributed.add_counts(*counts.flat), counts.shape)
        self._rows.append(torch.cat([norms, sums], dim=1))
        self._counts += counts.tolist()
        self._pending = []

    def read(self) -> Totals:
        """Read the device, once."""
        self._fold()
        rows, counts = np.array(torch.cat(self._rows).tolist()), np.array(self._counts)
        bad = rows[:, 0] > 0
        columns = np.split(rows[~bad], np.cumsum(list(self.widths.values()))[:-1], axis=1)
        norms = {name: column for name, column in zip(self.widths, columns) if name in (GRAD_NORM, GRAD_NORM_GROUPS)}
        sums = {name: column for name, column in zip(self.widths, columns) if name not in (BAD, *norms)}
        learnt = counts[~bad].sum(axis=0).tolist()
        return Totals(
            bad.tolist(),
            {name: (column.sum(axis=0) / ((~bad).sum() or math.nan)).tolist() for name, column in norms.items()},
            {name: column.sum(axis=0).tolist() for name, column in sums.items()},
            {**dict(zip(COUNTS, counts.sum(axis=0).tolist())), "targets": learnt[0]},
            learnt[len(COUNTS) :][: self._num_buckets],
            learnt[len(COUNTS) + self._num_buckets :],
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; on every rank."""
        self._fold()
        return {
            "widths": dict(self.widths),
            "rows": torch.cat(self._rows) if self._rows else torch.zeros(0, 0),
            "counts": self._counts,
            "waited": self.waited,
            "seconds": self.seconds,
            "bad_in_a_row": self.bad_in_a_row,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint, on every rank."""
        self.clear()
        self.widths, self._counts = dict(state["widths"]), list(state["counts"])
        if self._counts:
            self._rows = [state["rows"].clone().to(self._device)]  # not the mapped file itself
        self.waited, self.seconds, self.bad_in_a_row = state["waited"], state["seconds"], state["bad_in_a_row"]
