"""The loss on images that are not trained, which tells whether the model learns or memorizes."""

import time
from typing import final

from diffengine import distributed
from diffengine.datasets import Sample, Stream, fixed_samples_of, open_dataset
from diffengine.datasets.findings import spread
from diffengine.datasets.split import FEWEST, MOST
from diffengine.engine.mmengine_seam import Hook
from diffengine.engine.run import Run
from diffengine.engine.step import Step
from diffengine.errors import require
from diffengine.evaluation.heldout import TIMES, FixedImage, fixed_images, held_out_losses, unigram_loss
from diffengine.models.base import MaskedImageModel
from diffengine.models.frozen import evaluating

FEWEST_TIMES, MOST_TIMES = 8, 40  # evaluations of a run that chooses its interval
LARGEST_SHARE = 0.05  # of the run's time, unless that allows fewer than the fewest
OVERFITTING = 0.02  # nats above the lowest held-out loss that are more than rounding
LEARNS = 0.1  # nats below chance, or below the loss before training, that are more than rounding
NO_GAIN = 0.01  # nats: a caption gain below it is near 0
UNIGRAM_IMAGES = 4096  # trained images whose tokens are counted


@final
class ValidationHook(Hook):
    """Evaluates held-out images and as many trained ones: before the first step, at intervals, and at the end.

    Writes `val/loss` (an estimate of the training loss, without dropout), `val/loss_t0` to `val/loss_t7` (by the share
    of masked tokens, most first), `val/loss/NAME` of each source, if there are several, `val/loss_uncaptioned`,
    `val/caption_gain` (how much captions lower the loss), `val/accuracy` and `val/train_loss`. Without held-out images,
    only the last one. Everything is fixed: images, crops, captions, masks. With an average (EMAHook), it is evaluated
    instead of the weights. Training is bit-identical without validation, apart from what is held out.

    Args:
        share: of the data's images to hold out, from 8 to 64 of them; 0 for none. See `datasets.split.hold_out`.
        data: other images to evaluate instead, as `data`, or a data set section.
        every: in the unit that the config counts; 0: never. None: as often as 5 % of the run's time allows, from 8 to
            40 times.
        patience: stop after so many evaluations in a row without a lower `val/loss`; None: never.
    """

    priority = "NORMAL"  # after the metrics' line, before the checkpoint of the same step

    def __init__(
        self,
        share: float = 0.05,
        data: str | list[str | dict] | dict | None = None,
        every: int | None = None,
        patience: int | None = None,
    ) -> None:
        require(0 <= share < 1, f"validation_share got {share}; expected a number from 0, below 1")
        require(every is None or every >= 0, f"validation_every got {every}; expected a number of steps or epochs")
        require(patience is None or patience >= 1, f"patience got {patience}; expected at least 1, or None")
        self.data, self.every, self.patience = data, every, patience
        if every != 0:
            self.held_out_share = 0.0 if data is not None else share
        self._held_out: list[FixedImage] = []
        self._twin: list[FixedImage] = []
        self._sources: list[str] = []
        self._steps: set[int] = set()
        self._evaluated_at: int | None = None

    @property
    def validates(self) -> bool:
        """Whether images are evaluated that are not trained, if the data has enough."""
        return self.every != 0 and (self.data is not None or bool(self.held_out_share))

    def before_train(self, run: Run) -> None:
        model = run.trainable
        if self.every == 0 or not isinstance(model, MaskedImageModel):
            return
        with run.not_training():
            self._read(run, model)
        if not self._twin:
            return
        if not self.every:
            self._choose_steps(run)
        if run.clock.done == 0:
            seconds = self._evaluate(run, model)
            counts = f"{len(self._held_out)} held-out and {len(self._twin)} trained images"
            times = len(self._steps) or run.clock.times_due(self.every)
            run.logger.info(f"validation: {counts}, {times} times; one takes {seconds:.2g} s")

    def after_step(self, run: Run, step: Step) -> None:
        due = run.clock.due(self.every) if self.every else run.clock.done in self._steps
        if self._twin and (due or run.clock.finished) and isinstance(run.trainable, MaskedImageModel):
            self._evaluate(run, run.trainable)

    def samples(self, stream: Stream, section: dict) -> tuple[list[tuple[Sample, int]], list[tuple[Sample, int]]]:
        """Images that are not trained and as many that are, after the image transforms, with digests of their content.

        Args:
            section: the data set's; `data` may be another path for it.
        """
        if self.data is None:
            held_out = stream.fixed_samples(stream.split.held_out)
        else:
            section = self.data if isinstance(self.data, dict) else {**section, "path": self.data}
            held_out = fixed_samples_of(open_dataset(section), stream.image_transforms, stream.seed, MOST)
        return held_out, stream.fixed_samples(stream.split.twin[: len(held_out) or FEWEST])

    def _read(self, run: Run, model: MaskedImageModel) -> None:
        """Tokenize the images once; with the reference of their tokens' frequencies."""
        stream = run.train_loop.stream
        held_out, twin = self.samples(stream, run.job.resolved["train_dataloader"]["dataset"])
        several = self.data is None and len(stream.sources) > 1
        self._sources = [source.name for source in stream.sources] if several else []
        self._held_out = fixed_images(model, held_out, run.seed)
        self._twin = fixed_images(model, twin, run.seed)
        if stream.cached_sample is not None:
            assert model.encoder is not None
            model.encoder.to_host()
            counted = [stream.trained[number] for number in spread(len(stream), UNIGRAM_IMAGES)]
            trained = [stream.fixed_sample(index) for index in counted]
        else:
            trained = [image.sample for image in self._twin]
        if self._held_out:
            run.reference_losses["unigram entropy"] = unigram_loss(trained, self._held_out, model.num_codes)

    def _choose_steps(self, run: Run) -> None:
        """The steps of an interval that was not given: a function of the config, so a resumed run has the same."""
        forwards = len(TIMES) * (2 * len(self._held_out) + len(self._twin))
        cost = forwards / (3 * run.clock.batch_size)  # in steps: a backward pass counts as two forward passes
        count = min(MOST_TIMES, max(FEWEST_TIMES, int(LARGEST_SHARE * run.clock.max_iters / cost)))
        self._steps = {round(number * run.clock.max_iters / count) for number in range(1, count + 1)} - {0}

    def _evaluate(self, run: Run, model: MaskedImageModel) -> float:
        """Evaluate, record, and compare with what came before; returns the seconds that it took."""
        if self._evaluated_at == run.clock.done:
            return 0.0
        self._evaluated_at, started = run.clock.done, time.perf_counter()
        size, optim = run.train_loop.micro.size, run.optim_wrapper

        with run.not_training(), run.averaged_weights(), evaluating(model), optim.cast_weights(), optim.autocast():
            values = held_out_losses(model, self._held_out, self._twin, size, sources=self._sources)
        if run.train_loop.stream.cached_sample is not None and model.encoder is not None:
            model.encoder.to_host()
        shown = ["val/loss", *(f"val/loss/{name}" for name in self._sources)]
        shown += ["val/caption_gain", "val/accuracy", "val/train_loss"]
        text = "  ".join(f"{name} {values[name]:.4f}" for name in shown if name in values)
        run.validation = (run.clock.done, values)
        run.record(values, f"step {run.clock.done}/{run.clock.max_iters}  {text}")
        if self._held_out:
            self._judge(run)
        return time.perf_counter() - started

    def _judge(self, run: Run) -> None:
        """Warn of what the curves show, and stop if they have shown no gain for long."""
        read = ("val/loss", "val/train_loss", "val/caption_gain")
        known = distributed.on_rank_0(lambda: run.metrics)
        lines = [line for line in known if all(line.get(name) is not None for name in read)]
        if not lines:  # no loss was finite
            return
        first, last, best = lines[0], lines[-1], min(lines, key=lambda line: line["val/loss"])
        since, chance = len(lines) - 1 - lines.index(best), run.trainable.chance_loss
        learnt = chance is None or best["val/loss"] < chance[1] - LEARNS
        rises = last["val/loss"] > best["val/loss"] + OVERFITTING and last["val/train_loss"] < best["val/train_loss"]
        if since >= 2 and learnt and rises:
            run.warn(f"over-fitting since step {best['iter']}: the held-out loss rises, that of trained images falls")
        learns = last["val/train_loss"] < first["val/train_loss"] - LEARNS
        gain = max(line["val/caption_gain"] for line in lines[1:] or lines)
        if run.clock.done >= run.clock.max_iters / 4 and learns and gain < NO_GAIN:
            run.warn(
                f"captions are ignored: the loss is only {gain:.3f} lower with them; check that they fit the images"
            )
        if self.patience is not None and since >= self.patience and not run.clock.finished:
            run.logger.info(f"stopping: no lower val/loss in {since} validations, since step {best['iter']}")
            run.clock.stop()
