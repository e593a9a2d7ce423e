"""The run's page, and `run.json`: what the run is doing."""

import json
import math
import time
from typing import Any, final

from diffengine import distributed
from diffengine.engine import facts
from diffengine.engine.mmengine_seam import Hook
from diffengine.engine.run import Run
from diffengine.engine.step import Step
from diffengine.errors import Diverged, Interrupted, UserError, require
from diffengine.files import write_text
from diffengine.models.base import MaskedImageModel
from diffengine.report import commands, read_run, write_page
from diffengine.text import one_line


@final
class ReportHook(Hook):
    """Writes `report.html`, the page of the run, and `run.json`, on which it rests.

    They are written at the start, with every preview and validation, when the run ends, however it ends, and every so
    many minutes. A page that cannot be written is a line in the log, and no reason to stop training.

    Args:
        minutes: at least this often; None for the moments above only.
    """

    priority = "LOWEST"  # after previews, checkpoints and the export

    def __init__(self, minutes: float | None = 5) -> None:
        require(minutes is None or minutes > 0, f"ReportHook got minutes={minutes}; expected more than 0, or None")
        self.minutes = minutes
        self._facts: dict[str, Any] = {}

    def before_train(self, run: Run) -> None:
        """Look at the data, once, and write the first page."""
        self._started, self._first = time.time(), run.clock.done
        self._written = time.monotonic()
        if distributed.rank() == 0:
            self._guarded(run, lambda: self._begin(run))
            self._write(run, "running")
            run.logger.info(f"the run's page: {run.job.work_dir / 'report.html'}")

    def after_step(self, run: Run, step: Step) -> None:
        due = self.minutes is not None and time.monotonic() - self._written >= 60 * self.minutes
        fresh = run.clock.done in (run.previewed_at, run.validation[0])
        if due or (fresh and not run.clock.finished):
            self._write(run, "running")

    def after_train(self, run: Run) -> None:
        self._write(run, "done")
        run.logger.info(f"the run's page: {run.job.work_dir / 'report.html'}")

    def on_error(self, run: Run, error: BaseException) -> None:
        if not self._facts:  # it ended before the first step
            return
        if isinstance(error, Interrupted | KeyboardInterrupt | SystemExit):
            self._write(run, "stopped")
            return
        self._facts["error"] = one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        self._write(run, "diverged" if isinstance(error, Diverged) else "failed")

    def _begin(self, run: Run) -> None:
        """Collect what does not change during the run."""
        earlier = read_run(run.job.work_dir).facts if self._first > 0 else {}  # of the run that is resumed
        masked = isinstance(run.trainable, MaskedImageModel)
        self._facts = {
            "name": earlier.get("name", run.name),
            "folder": str(run.job.work_dir),
            "max_iters": run.clock.max_iters,
            "started": earlier.get("started", self._started),
            "generates": masked,
            "processes": distributed.world_size(),
            "environment": facts.environment(run),
            "data": facts.data_at_a_glance(run),
            "warnings": [],
        }
        warnings = [item for item in earlier.get("warnings", []) if item["step"] <= self._first]
        self._before = {"seconds": earlier.get("seconds", 0.0), "warnings": warnings}

    def _write(self, run: Run, status: str) -> None:
        self._written = time.monotonic()
        if distributed.rank() == 0 and self._facts:
            self._guarded(run, lambda: self._write_files(run, status))

    def _write_files(self, run: Run, status: str) -> None:
        now, done = time.time(), run.clock.done
        spent = now - self._started
        left = run.clock.max_iters - done
        pace = spent / (done - self._first) if done > self._first else None
        warnings: dict[str, Any] = {}
        for item in [*self._before["warnings"], *run.warnings]:  # each once, as of `Run.warn`
            warnings.setdefault(item["text"].partition(":")[0], item)
        files = read_run(run.job.work_dir)
        last = [line["loss"] for line in files.lines if "loss" in line][-1:]
        if status == "failed" and last == [None]:
            status = "diverged"
        prompts = files.prompts["prompts"]
        known = {
            **self._facts,
            "status": status,
            "step": done,
            "updated": now,
            "seconds": self._before["seconds"] + spent,
            "seconds_left": None if pace is None else pace * left,
            "references": {name: value for name, value in run.reference_losses.items() if math.isfinite(value)},
            "warnings": list(warnings.values()),
            "memory": {**run.memory(), "peak": run.peak_memory(), "checkpoint": run.checkpoint_bytes()},
            "commands": commands(
                run.job.work_dir, self._facts["generates"], prompts[0] if prompts else "a prompt of your own",
                self._facts["processes"],
            ),
        }  # fmt: skip
        write_text(run.job.work_dir / "run.json", json.dumps(known, ensure_ascii=False, indent=1))
        write_page([run.job.work_dir], run.job.work_dir / "report.html", status)

    def _guarded(self, run: Run, work: Any) -> None:
        """Do `work`; a page is not worth a run, so an error is logged."""
        try:
            work()
        except Exception as error:  # noqa: BLE001
            run.logger.info(f"the run's page was not written: {type(error).__name__}: {one_line(error)}")
