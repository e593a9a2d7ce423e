"""A run, from a config to its trained model."""

import copy
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, final

from torch import Tensor

from diffengine import distributed
from diffengine.cache import CachedDataset
from diffengine.datasets import (
    ImageDataset,
    Shapes,
    first_batch,
    hold_out,
    inspect,
    is_encoded,
    micro_batches,
)
from diffengine.engine import build, checkpoint, memory, state, workdir
from diffengine.engine.build import Job, Training
from diffengine.engine.class_images import generate_missing
from diffengine.engine.clock import Clock
from diffengine.engine.compiling import compile_model
from diffengine.engine.loop import StepLoop
from diffengine.engine.mmengine_seam import AnyHook, BaseVisBackend, Runner, close_logger
from diffengine.engine.optim import describe_groups, trained_parameters
from diffengine.engine.precision import DTYPES, is_measured, measure, resolve_precision
from diffengine.engine.step import Step
from diffengine.errors import UserError, disk_errors, quiet_threads, require
from diffengine.models.base import MaskedImageModel
from diffengine.report.read import damage, read_lines
from diffengine.terminal import LiveLine

MOST_READ = 2000  # image headers
MANY_EPOCHS, FEW_IMAGES = 200, 8  # fewer images, such as one of a style, are meant to be memorized


def train(job: Job, resume: str | None = None, overwrite: bool = False) -> "Run":
    """Train a config: claim its work dir, build it, train it.

    Args:
        resume: "newest" for the work dir's newest checkpoint, or a checkpoint's path; None to start.
        overwrite: delete the run that the work dir holds.

    Raises:
        UserError: on every rank, if anything cannot be built or trained.
        Interrupted: a signal asked to stop; the step was finished and saved.
    """
    with disk_errors(), workdir.claimed(job.work_dir, resume, overwrite) as path:
        run = build_run(job, path)
        run.announce()
        run.train()
    return run


def build_cache(job: Job) -> None:
    """Build a job's token cache, unless it is up to date; a UserError if the config has none."""
    section = job.resolved.get("token_cache", {})
    require(section.get("use") is not False, "this config trains without a token cache: set --cfg-options cache=auto")
    build_training(replace(job, resolved={**job.resolved, "token_cache": {**section, "use": True}}))


def build_run(
    job: Job, resume: Path | None = None, dataset: ImageDataset | None = None, assets: Mapping[str, str] | None = None
) -> "Run":
    """Build a run that is ready to train, or to continue from the checkpoint `resume`.

    Before data, model and optimizer are built, no file of an old run is deleted, and only class images and the token
    cache are written. `dataset` and `assets` replace the config's data set and what is learnt from it.
    """
    with distributed.all_ranks():
        saved = state.read_whole(resume) if resume else None
        weights = state.read_whole(job.init_from) if job.init_from else None
        if saved and resume:
            state.check_same_run(saved, job.config, resume)
        else:
            workdir.check_inputs(job)
        backends, hooks = build.build_backends(job), build.build_hooks(job)
    start = saved["counters"]["iter"] if saved else 0
    share = build.held_out_share(hooks)
    if source := saved or weights:
        assets = source["assets"]
    kept = saved.get("precision", "fp32") if saved else None  # 0.1.0 kept none, and was in fp32 on a CPU
    training = build_training(job, start, dataset, assets, share, kept)
    model, loop, *_ = training
    with distributed.all_ranks():
        if weights:
            model.load_trained_state(weights["model"], f"--init-from '{job.init_from}'")
        compiled = compile_model(loop.compile, model, loop.max_iters - start, job.device)
        if saved and resume:
            state.check_fits(saved, resume, training)
    damaged = distributed.on_rank_0(
        lambda: workdir.begin(job.work_dir, job.config, job.name, bool(saved), model.exportable)
    )
    run = Run(job, training, hooks, backends, compiled)
    if saved and resume:
        state.restore(run, saved, resume)
        run.logger.info(f"resumed {resume} at step {start}")
    run.warn_of_damage(damaged)
    return run


def build_training(
    job: Job, start: int = 0, dataset: ImageDataset | None = None, assets: Mapping[str, str] | None = None,
    held_out_share: float | None = None, kept: str | None = None,
) -> Training:  # fmt: skip
    """Build model, loop, optimizer, schedule and cache, starting at step `start`; generate missing class images.

    `dataset` and `assets` are as of `build_run`. `held_out_share`: of the images, not trained; None: nobody asks.
    `kept`: the precision of the run that is resumed.
    """
    resolved, device, seed = job.resolved, job.device, job.resolved["seed"]
    with distributed.all_ranks():
        dataset = dataset or build.build_dataset(job)
    split = None
    if held_out_share is not None:
        split = distributed.on_rank_0(lambda: hold_out(dataset, held_out_share))
    if assets is None:
        assets = build.learn_assets(job, dataset)
    with distributed.all_ranks():
        model = build.build_model(resolved, assets, seed)
        wanted = resolved["optim_wrapper"].get("precision", "auto")
        precision, _ = resolve_precision(wanted, device, kept)
        if precision in DTYPES:
            model.hold_frozen(DTYPES[precision])
        model.to(device).train()
        data = {**resolved["train_dataloader"], "dataset": dataset}
        dataloader = build.build_dataloader(**data, model=model, seed=seed, start_iter=start, split=split)
        loop = StepLoop(**resolved["train_cfg"], dataloader=dataloader)
        optim = build.build_optim_wrapper(**resolved["optim_wrapper"], model=model, kept=kept)
        rates = resolved.get("param_scheduler", {})
        schedule = build.build_param_scheduler(**rates, optimizer=optim.optimizer, num_iters=loop.max_iters)
    generate_missing(dataset, model, optim)
    with distributed.all_ranks():
        if not isinstance(dataset, CachedDataset):
            loop.stream[start * loop.batch_size]  # an error in the data shows before the run writes anything
        cache = build.build_token_cache(job, loop.stream, model, optim)
    cached = cache.attach_images(loop.max_iters * loop.batch_size)
    if kept is None and is_measured(wanted, device, passes := loop.max_iters * loop.micro.count):
        with distributed.all_ranks():
            batch = micro_batches(first_batch(loop.dataloader), loop.micro.count)[0]
        optim.precision, optim.why = measure(model, optim, batch, start, passes)
    if cached:
        cache.attach_captions()  # which are encoded in that precision
    return model, loop, optim, schedule, cache


@final
class Run(Runner):
    """One run of training. Hooks and commands ask it for everything that they need to know of one another."""

    train_loop: StepLoop  # mmengine's property

    def __init__(
        self, job: Job, training: Training, hooks: Sequence[AnyHook], backends: Sequence[BaseVisBackend], compiled: str
    ) -> None:
        self.job, self.name, self.config = job, job.name, job.config
        self.trainable, loop, optim, schedule, self.cache = training  # trainable: `model` without DDP
        self.compiled = compiled  # how the blocks run, and why
        self.average: dict[str, Tensor] = {}  # weights by name, if a hook keeps an average (EMAHook)
        self.checkpoints_kept = 0  # the most on disk at once, set by CheckpointHook
        self.previewed_at: int | None = None  # the step of the newest preview, set by PreviewHook
        self.next_preview: int | None = None  # its step, set by PreviewHook
        self.live_line: LiveLine | None = None  # what a terminal shows, set by MetricsHook
        self.validation: tuple[int, dict[str, float]] = (0, {})  # the last one: its step, and its values by name
        chance = self.trainable.chance_loss
        self.reference_losses: dict[str, float] = {} if chance is None else dict([chance])
        self.warnings: list[dict[str, Any]] = []  # {"step", "text"}, see `warn`
        self._peak = 0
        super().__init__(job, self.trainable, hooks, backends)
        self._train_loop, self.optim_wrapper, self.param_scheduler = loop, optim, schedule

    @property
    def work_dir(self) -> Path:
        return Path(self._work_dir)

    @property
    def clock(self) -> Clock:
        """Steps and epochs."""
        return self.train_loop.clock

    @quiet_threads()
    def train(self, steps: int | None = None, synchronize: bool = False) -> Step | None:
        """Train to the end, or for so many `steps`, between the hooks' `before_run` and `after_run`.

        Returns the last step. `synchronize` waits for the device wherever a step is timed.
        """
        try:
            with disk_errors():
                self.call_hook("before_run")
                memory.reset_peak()
                step = self.train_loop.run(self, steps, synchronize)
                self.call_hook("after_run")
                self.visualizer.close()
            return step
        except BaseException as error:
            for last in (partial(self.call_hook, "on_error", error=error), self.visualizer.close):
                with suppress(OSError):  # of the disk, which may be full: the first error is the one to report
                    last()
            raise
        finally:
            if self.live_line is not None:
                self.live_line.close()
            close_logger(self.logger)

    def announce(self) -> None:
        """Log what will be trained and how, and how much of images and captions is cut off."""
        clock, stream, info = self.clock, self.train_loop.stream, self.logger.info
        images = f"{stream.images} images"
        if clock.num_samples != stream.images:
            images += f", {clock.num_samples} samples an epoch"
        info(
            f"{self.name}: {images}, {clock.max_iters} steps of {clock.batch_size}, "
            f"{self.trained_parameters:,} trained parameters, {self.precision} on {distributed.world_size()} x "
            f"{self.job.device.type}, in {self.work_dir}"
        )
        for row in stream.source_rows() if len(stream.sources) > 1 else ():
            info(
                "source {name}: {trained} of {images} images, {samples} samples an epoch, weight {weight:g}".format(
                    **row
                )
            )
        groups = self.job.resolved["optim_wrapper"].get("param_groups") or ()
        for text in describe_groups(groups, self.optim_wrapper.optimizer):
            info(f"param_groups: {text}")
        if distributed.rank() == 0:
            shapes = Shapes.made_by(stream.image_transforms)
            findings = inspect(stream.dataset, shapes, self.trainable.caption_lengths, seconds=0, most=MOST_READ)
            printed = is_encoded(stream.dataset) and (shapes is None or shapes.is_usual)  # by `look`
            info(findings.summary, extra={"printed": not printed})
            for line in findings.cut_captions():
                self.warn(line)
            self._warn_of_settings(shapes.side if shapes else min(stream.dataset.size(0) or [0]) or None)
        info(f"blocks run {self.compiled}")

    def _warn_of_settings(self, side: int | None) -> None:
        """Warn of what the settings alone show; `side` is that of the images in pixels."""
        clock, model = self.clock, self.trainable
        rates = self.job.resolved.get("param_scheduler", {})
        warmup, schedule = rates.get("warmup_iters", 0), rates.get("name", "constant")
        if self.optim_wrapper.schedule_free and schedule != "constant":
            name = type(self.optim_wrapper.optimizer).__name__
            advice = "set lr_schedule='constant', and the optimizer's own warmup_steps for a warm-up"
            self.warn(f"the lr schedule '{schedule}' with {name}: it averages the weights instead; {advice}")
        if warmup >= clock.max_iters:
            self.warn(f"the run ends inside its warm-up: {clock.max_iters} steps of {warmup}; lower warmup_iters")
        for row in self.train_loop.stream.source_rows():
            images = row["trained"]
            epochs = clock.max_iters * clock.batch_size * row["samples"] // (clock.num_samples * (images or 1))
            if epochs > MANY_EPOCHS and images > FEW_IMAGES:
                self.warn(f"{epochs} epochs over {images} images: they will be memorized; train fewer steps")
        if isinstance(model, MaskedImageModel) and side is not None and side != model.side:
            self.warn(f"the resolution is not the model's: {side} px, and it was made for {model.side} px")

    @property
    def precision(self) -> str:
        """The precision of a step, and why."""
        return f"{self.optim_wrapper.precision} ({self.optim_wrapper.why})"

    @property
    def trained_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in trained_parameters(self.trainable).values())

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model has the average instead of its weights, if the run or its optimizer keeps one."""
        trained = dict(self.trainable.named_parameters())
        live = {name: trained[name].data for name in self.average}
        with self.optim_wrapper.eval_weights():
            try:
                for name, weight in self.average.items():
                    trained[name].data = weight.to(live[name].dtype)
                yield
            finally:
                for name, weight in live.items():
                    trained[name].data = weight

    def memory(self) -> dict[str, int]:
        """Bytes on the device, as `memory_of`: of weights, copies, gradients, the optimizer and EMAHook's average."""
        copies = self.optim_wrapper.copies
        return memory.memory_of(
            self.trainable, self.optim_wrapper.optimizer, self.average, copies.tensors if copies else ()
        )

    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint on disk, to 1 %, once the optimizer has its state."""
        state_tensors = memory.tensors_in(self.optim_wrapper.optimizer.state)
        tensors = [*self.trainable.trained_state().values(), *state_tensors, *self.average.values()]
        tensors += self.optim_wrapper.parameters if self.optim_wrapper.schedule_free else []
        texts = sum(len(text.encode()) for text in self.trainable.assets.values())
        return memory.nbytes(tensors) + memory.ENTRY * len(tensors) + memory.CONFIG + texts

    def peak_memory(self) -> int:
        """The most bytes that training took so far. On a GPU, what ran inside `not_training` is left out."""
        return max(self._peak, memory.peak_bytes())

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """Inside, memory does not count as training's: previews bring back encoders and the VQ decoder."""
        self._peak = self.peak_memory()
        yield
        memory.reset_peak()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        lines, damaged = read_lines(self.work_dir / "metrics.jsonl")
        self.warn_of_damage(damaged)
        return lines

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints in the work dir, the newest last."""
        return sorted(checkpoint.paths(self.work_dir), key=checkpoint.steps)

    def record(
        self, values: Mapping[str, float], text: str, once: Mapping[str, float] | None = None, printed: bool = True
    ) -> None:
        """Write numbers of this moment to `metrics.jsonl` and the visualizer's backends, and a line to the log.

        What is no curve (`once`) goes to the file alone. `printed`: whether the line goes to the console, too.
        """
        if distributed.rank() != 0:
            return
        line = {
            "iter": self.clock.done,
            "epoch": self.clock.epochs_done,
            "time": round(time.time(), 3),
            **values,
            **(once or {}),
        }
        finite = {name: value if math.isfinite(value) else None for name, value in line.items()}  # JSON has no NaN
        with (self.work_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
        self.visualizer.add_scalars(dict(values), step=self.clock.done)
        self.logger.info(text, extra={"printed": printed})

    def warn(self, text: str) -> None:
        """Say once what is likely to spoil the run, "what: why", on the console, in the log, and for the report."""
        if text.partition(":")[0] not in [warning["text"].partition(":")[0] for warning in self.warnings]:
            self.warnings.append({"step": self.clock.done, "text": text})
            self.logger.info(f"warning: {text}")

    def warn_of_damage(self, lines: int) -> None:
        """Warn if so many lines of `metrics.jsonl` could not be read."""
        if lines:
            self.warn(damage(lines))

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint in our format: mmengine's CheckpointHook calls this, on every rank."""
        saved = state.collect(self)
        distributed.on_rank_0(lambda: checkpoint.write(Path(out_dir, filename), saved))

    def pipeline(self) -> Any:
        """A diffusers pipeline over the trained model: with an adapter on its base, if that is what was trained.

        With a schedule-free optimizer it is over a copy, which has the weights to be used.

        Raises:
            UserError: the model generates nothing from text.
        """
        if not isinstance(self.trainable, MaskedImageModel):
            raise UserError(f"{type(self.trainable).__name__} has no pipeline: it generates nothing from text")
        with self.optim_wrapper.eval_weights():
            pipeline = self.trainable.eval().build_pipeline()
            return copy.deepcopy(pipeline) if self.optim_wrapper.schedule_free else pipeline
