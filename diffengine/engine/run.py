"""A run, from a config to its trained model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, final

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from diffengine import distributed
from diffengine.cache import CachedDataset, TokenCache
from diffengine.datasets import ImageDataset, survey, survey_captions
from diffengine.engine import build, checkpoint, memory, state, workdir
from diffengine.engine.build import Job
from diffengine.engine.class_images import generate_missing
from diffengine.engine.clock import Clock
from diffengine.engine.compiling import compile_model
from diffengine.engine.loop import Step, StepLoop
from diffengine.engine.mmengine_seam import AnyHook, BaseVisBackend, Runner, close_logger
from diffengine.engine.optim import DTYPES, StepOptimWrapper, resolve_precision
from diffengine.errors import UserError
from diffengine.models.base import MaskedImageModel, TrainableModel


def train(job: Job, resume: str | None = None, overwrite: bool = False) -> "Run":
    """Train a config: claim its work dir, build every part of it, train.

    Args:
        resume: "newest" for the work dir's newest checkpoint, or a checkpoint's path; None to start.
        overwrite: delete the run that the work dir holds.

    Raises:
        UserError: on every rank, if anything cannot be built or trained.
        Interrupted: a signal asked to stop; the step was finished and saved.
    """
    with workdir.claimed(job.work_dir, resume, overwrite) as path:
        run = build_run(job, path)
        run.announce()
        run.train()
    return run


def build_run(
    job: Job,
    resume: Path | None = None,
    dataset: ImageDataset | None = None,
    assets: Mapping[str, str] | None = None,
) -> "Run":
    """Build a run that is ready to train. Nothing is written, and no old run deleted, before every part is built.

    Args:
        resume: the checkpoint to continue from.
        dataset, assets: instead of the config's, and of what is learnt from it.

    Raises:
        UserError: on every rank, if a part cannot be built on any.
    """
    saved = None
    with distributed.all_ranks():
        if resume:
            saved = state.read_for_resume(resume, job.config)
        backends, hooks = build.build_backends(job), build.build_hooks(job)
    start = saved["counters"]["iter"] if saved else 0
    model, loop, optim, schedule, cache = build_training(job, start, dataset, saved["assets"] if saved else assets)
    with distributed.all_ranks():
        compiled = compile_model(loop.compile, model, loop.max_iters - start, job.device)
        if saved and resume:
            state.check_fits(saved, resume, model, loop, optim, schedule)
    distributed.on_rank_0(lambda: workdir.begin(job.work_dir, job.config, job.name, bool(saved), model.exportable))
    run = Run(job, model, loop, optim, schedule, hooks, backends, cache, compiled)
    if saved and resume:
        state.restore(run, saved, resume)
        run.logger.info(f"resumed {resume} at step {start}")
    return run


def build_training(
    job: Job, start: int = 0, dataset: ImageDataset | None = None, assets: Mapping[str, str] | None = None
) -> tuple[TrainableModel, StepLoop, StepOptimWrapper, LRScheduler, TokenCache]:
    """Build the model, the loop over its data, the optimizer and its schedule, and attach the token cache.

    Missing class images are generated, and tokens encoded, on the way.

    Args:
        start: the step to continue from.
        dataset, assets: as of `build_run`.
    """
    resolved, device, seed = job.resolved, job.device, job.resolved["seed"]
    with distributed.all_ranks():
        dataset = dataset or build.build_dataset(job)
    if assets is None:
        assets = build.learn_assets(job, dataset)
    with distributed.all_ranks():
        model = build.build_model(resolved, assets, seed)
        precision, _ = resolve_precision(resolved["optim_wrapper"].get("precision", "auto"), device)
        if precision in DTYPES:
            model.hold_frozen(DTYPES[precision])
        model.to(device).train()
        data = {**resolved["train_dataloader"], "dataset": dataset}
        dataloader = build.build_dataloader(**data, model=model, seed=seed, start_iter=start)
        loop = StepLoop(**resolved["train_cfg"], dataloader=dataloader)
        optim = build.build_optim_wrapper(**resolved["optim_wrapper"], model=model)
        schedule = build.build_param_scheduler(
            **resolved.get("param_scheduler", {}), optimizer=optim.optimizer, num_iters=loop.max_iters
        )
    generate_missing(dataset, model, optim)
    with distributed.all_ranks():
        if not isinstance(dataset, CachedDataset):
            loop.stream[start * loop.batch_size]  # an error in the data shows before the run writes anything
        cache = TokenCache(
            **resolved.get("token_cache", {}), stream=loop.stream, encoder=model.encoder,
            data=resolved["train_dataloader"], work_dir=job.work_dir, precision=optim.precision,
            autocast=optim.autocast,
        )  # fmt: skip
    cache.attach(loop.max_iters * loop.batch_size)
    return model, loop, optim, schedule, cache


@final
class Run(Runner):
    """One run of training. Hooks and commands ask it for everything that they need to know of one another.

    Attributes:
        job: the config, and where the run goes.
        trainable: the model, behind any DDP wrapper (`model`).
        train_loop: takes the steps. optim_wrapper: steps the optimizer. param_scheduler: changes the learning rate.
        cache: the token cache.
        compiled: how the blocks run, and why.
        average: averaged weights by name, if a hook keeps an average (EMAHook); else empty.
        checkpoints_kept: the most checkpoints on disk at once, set by CheckpointHook; 0 if none are written.
    """

    train_loop: StepLoop
    optim_wrapper: StepOptimWrapper
    param_scheduler: LRScheduler

    def __init__(
        self,
        job: Job,
        model: TrainableModel,
        loop: StepLoop,
        optim: StepOptimWrapper,
        schedule: LRScheduler,
        hooks: Sequence[AnyHook],
        backends: Sequence[BaseVisBackend],
        cache: TokenCache,
        compiled: str,
    ) -> None:
        self.job = job
        self.trainable = model
        self.cache = cache
        self.compiled = compiled
        self.average: dict[str, Tensor] = {}
        self.checkpoints_kept = 0
        self._peak = 0
        super().__init__(model, job.work_dir, hooks, backends, job.config, job.name, job.resolved["seed"])
        self._train_loop = loop
        self.optim_wrapper = optim
        self.param_scheduler = schedule

    @property
    def name(self) -> str:
        """The config's name."""
        return self.job.name

    @property
    def config(self) -> dict[str, Any]:
        """The config as written."""
        return self.job.config

    @property
    def work_dir(self) -> Path:
        return Path(self._work_dir)

    @property
    def clock(self) -> Clock:
        """Steps and epochs."""
        return self.train_loop.clock

    def train(self, steps: int | None = None, synchronize: bool = False) -> Step | None:
        """Train to the end between the hooks' `before_run` and `after_run`.

        Args:
            steps: take only so many steps.
            synchronize: wait for the device wherever a step is timed.

        Returns:
            The last step.
        """
        try:
            self.call_hook("before_run")
            memory.reset_peak()
            step = self.train_loop.run(self, steps, synchronize)
            self.call_hook("after_run")
            return step
        finally:
            self.visualizer.close()
            close_logger(self.logger)

    def announce(self) -> None:
        """Log what will be trained, how, and what of images and captions is cut off."""
        clock, stream, info = self.clock, self.train_loop.stream, self.logger.info
        wanted = self.job.resolved["optim_wrapper"].get("precision", "auto")
        precision, why = resolve_precision(wanted, self.job.device)
        info(
            f"{self.name}: {clock.num_samples} images, {clock.max_iters} steps of {clock.batch_size}, "
            f"{self.trained_parameters:,} trained parameters, {precision} ({why}) on {distributed.world_size()} x "
            f"{self.job.device.type}, in {self.work_dir}"
        )
        if distributed.rank() == 0:
            sizes = [size for size in (getattr(item, "size", None) for item in stream.image_transforms) if size]
            captions = chain.from_iterable(stream.dataset.all_captions())
            lines = [survey(stream.dataset, sizes[-1])] if sizes else []
            for line in [*lines, survey_captions(captions, self.trainable.caption_lengths)]:
                if line:
                    info(line)
        info(f"blocks run {self.compiled}")

    # ------------------------------------------------------------------------------------------- what hooks ask for

    @property
    def trained_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.trainable.parameters() if parameter.requires_grad)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model has the average instead of its weights, if the run keeps one; nothing is copied."""
        trained = dict(self.trainable.named_parameters())
        live = {name: trained[name].data for name in self.average}
        try:
            for name, weight in self.average.items():
                trained[name].data = weight.to(live[name].dtype)
            yield
        finally:
            for name, weight in live.items():
                trained[name].data = weight

    def memory(self) -> dict[str, int]:
        """Bytes on the device: "trained" and "frozen" weights, "gradients", "optimizer" state, EMAHook's "average"."""
        return memory.memory_of(self.trainable, self.optim_wrapper.optimizer, self.average)

    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint on disk, to 1 %, once the optimizer has its state."""
        state_tensors = memory.tensors_in(self.optim_wrapper.optimizer.state)
        tensors = [*self.trainable.trained_state().values(), *state_tensors, *self.average.values()]
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

    # -------------------------------------------------------------------------------------------------- from Python

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        file = self.work_dir / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints in the work dir, the newest last."""
        return sorted(checkpoint.paths(self.work_dir), key=checkpoint.steps)

    def pipeline(self) -> Any:
        """A diffusers pipeline over the trained model: with an adapter on its base, if that is what was trained.

        Raises:
            UserError: the model generates nothing from text.
        """
        if not isinstance(self.trainable, MaskedImageModel):
            raise UserError(f"{type(self.trainable).__name__} has no pipeline: it generates nothing from text")
        return self.trainable.eval().build_pipeline()
