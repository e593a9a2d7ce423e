"""Generating images: AmusedPipeline's tokens where it is right, and ours where it is not."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AmusedImg2ImgPipeline, AmusedInpaintPipeline, AmusedPipeline, AmusedScheduler, UVit2DModel
from diffusers.schedulers.scheduling_amused import gumbel_noise, mask_by_random_topk
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffengine.errors import UserError
from diffengine.models.amused import sampler as sampling
from diffengine.models.amused.sampler import AmusedSampler, halton_rank, masked_share, usual_guidance
from diffengine.models.amused.transformer import conditions_once, trunk
from diffengine.models.generation import GenerationOptions, ImageRequest, NotFinite
from tests.support import models, photos

MASK = 79  # the mask's id, in both models
TEMPERATURES: list[Any] = [(2, 0), 0.0, 1.5, (4.5, 0.5), (0.0, 0.0), 10]
QUICK = GenerationOptions(guidance_scale=3.0, num_inference_steps=4)


def shallow(size: models.Size, resolution: int) -> AmusedPipeline:
    """A small pipeline whose transformer has one layer, for speed."""
    pipeline = models.make_pipeline(size, resolution=resolution)
    sizes = {**models.transformer_config(size, resolution), "num_hidden_layers": 1, "num_res_blocks": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline.register_modules(transformer=UVit2DModel(**sizes).eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipelines() -> dict[int, AmusedPipeline]:
    """By pixels per token: f = 4, 8x8 tokens, halved inside; f = 16, 16x16 tokens, not halved. Do not modify them."""
    return {4: shallow("toy", 32), 16: shallow("tiny", 256)}


def with_schedule(pipeline: AmusedPipeline, schedule: str, cls: Any = AmusedPipeline) -> Any:
    """A pipeline of some class over the same modules, which share no scheduler."""
    scheduler = AmusedScheduler(mask_token_id=MASK, masking_schedule=schedule)
    other = cls(**{**pipeline.components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    return other


def sampler_of(pipeline: AmusedPipeline) -> AmusedSampler:
    return AmusedSampler(**pipeline.components)


@pytest.fixture
def toy_sampler(pipelines: dict[int, AmusedPipeline]) -> AmusedSampler:
    return sampler_of(pipelines[4])


def options(guidance: float, steps: int, temperature: Any = (2, 0), **rest: Any) -> GenerationOptions:
    return GenerationOptions(guidance, steps, temperature, **rest)


def theirs(pipeline: Any, prompt: str, seed: int, *images: Image.Image, **settings: Any) -> Tensor:
    """The ids that a pipeline of diffusers generates."""
    generator = torch.Generator().manual_seed(seed)
    return pipeline(prompt, *images, generator=generator, output_type="latent", **settings).images


def same(left: Image.Image, right: Image.Image) -> bool:
    return left.size == right.size and left.tobytes() == right.tobytes()


def photo(width: int, height: int, name: str = "cat") -> Image.Image:
    return photos.photos()[name].convert("RGB").resize((width, height))


def mask_of(masked: np.ndarray, factor: int) -> Image.Image:
    """An image that is white where tokens (h,w) are masked."""
    return Image.fromarray(np.kron(masked, np.full((factor, factor), 255)).astype(np.uint8))


def counts(sampler: AmusedSampler, request: ImageRequest, settings: GenerationOptions, grid: tuple) -> list[int]:
    """How many tokens are masked after each step."""
    seen: list[int] = []
    sampler.tokens([request], settings, grid, lambda ids: seen.append(int((ids == MASK).sum())))
    return seen


def by_hand(
    pipeline: AmusedPipeline, request: ImageRequest, scales: Sequence[float], grid: tuple, start: Tensor | None = None,
    schedule: str = "cosine",
) -> Tensor:  # fmt: skip
    """The ids that AmusedScheduler generates with another guidance scale at each step.

    Args:
        start: ids (h,w) to start from, some of which are masked.
    """
    h, w = grid
    factor = pipeline.vae_scale_factor
    scheduler = AmusedScheduler(mask_token_id=MASK, masking_schedule=schedule)
    scheduler.set_timesteps(len(scales), (2, 0))
    generator = torch.Generator().manual_seed(request.seed)
    ids = torch.full((1, h, w), MASK) if start is None else start[None].clone()
    share = (ids == MASK).sum() / ids.numel()
    micro_conds = torch.tensor([[w * factor, h * factor, 0, 0, 6]], dtype=torch.float32)

    def logits(prompt: str) -> Tensor:
        text_ids = pipeline.tokenizer(
            prompt, padding="max_length", truncation=True, return_tensors="pt",
            max_length=pipeline.tokenizer.model_max_length,
        ).input_ids  # fmt: skip
        text = pipeline.text_encoder(text_ids, output_hidden_states=True)
        return pipeline.transformer(ids, text.hidden_states[-2], text.text_embeds, micro_conds)

    with torch.no_grad():
        for scale, timestep in zip(scales, scheduler.timesteps):
            output = logits(request.prompt)
            if scale > 1:
                uncond = logits(request.negative_prompt)
                output = uncond + scale * (output - uncond)
            ids = scheduler.step(output, timestep, ids, starting_mask_ratio=share, generator=generator).prev_sample
    return ids


# ------------------------------------------------------------------------------------- equal to AmusedPipeline


def combinations() -> Iterator[tuple[int, str, tuple, float, int, Any]]:
    """(factor, schedule, grid, guidance, steps, temperature): 192, and one of each further number of steps."""
    cycle, number = (1, 2, 3, 4, 5, 6, 8, 12), 0
    grids = {4: [(8, 8), (4, 6), (10, 4)], 16: [(4, 4), (3, 5), (5, 2)]}
    for factor, schedule, guidance in product((4, 16), ("cosine", "linear"), (1.0, 10.0)):
        for grid, _ in product(grids[factor], range(8)):
            steps = min(cycle[number % 8], math.prod(grid))
            yield factor, schedule, grid, guidance, steps, TEMPERATURES[number % len(TEMPERATURES)]
            number += 1
    for steps in sorted(set(range(1, 25)) - set(cycle)):
        yield 4, ("cosine", "linear")[steps % 2], (6, 4), (10.0, 1.0)[steps // 2 % 2], steps, TEMPERATURES[steps % 6]


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.soak)])
def test_ids_equal_those_of_the_pipeline(pipelines: dict[int, AmusedPipeline], every: int) -> None:
    judges = {
        (factor, schedule): with_schedule(pipelines[factor], schedule)
        for factor, schedule in product((4, 16), ("cosine", "linear"))
    }
    samplers = {key: sampler_of(judge) for key, judge in judges.items()}
    tried, seen, wrong = list(combinations())[::every], set(), []
    for seed, (factor, schedule, (h, w), guidance, steps, temperature) in enumerate(tried):
        prompt = ("a cat", "yoda pokemon")[seed % 2]
        expected = theirs(
            judges[factor, schedule], prompt, seed, height=h * factor, width=w * factor, guidance_scale=guidance,
            num_inference_steps=steps, temperature=temperature,
        )  # fmt: skip
        request = ImageRequest(prompt, seed)
        ids = samplers[factor, schedule].tokens([request], options(guidance, steps, temperature), (h, w))
        assert ids.dtype == torch.int64
        seen.add(tuple(expected.flatten().tolist()))
        if not torch.equal(ids, expected):
            wrong.append(tried[seed])
    assert wrong == []
    assert len(tried) >= 200 / every
    if every == 1:
        assert {steps for *_, steps, _ in tried} == set(range(1, 25))
    assert len(seen) == len(tried)  # no two are equal: every setting matters


def test_ids_equal_those_of_the_pipeline_at_its_own_size(pipelines: dict[int, AmusedPipeline]) -> None:
    """Nothing but the prompt and the seed is given; 16x16 tokens, guidance 10, 12 steps."""
    ids = sampler_of(pipelines[16]).tokens([ImageRequest("a", 3)], GenerationOptions(10.0), (16, 16))
    assert torch.equal(ids, theirs(pipelines[16], "a", 3))


def test_images_equal_those_of_the_pipeline(pipelines: dict[int, AmusedPipeline]) -> None:
    settings = {"guidance_scale": 3.0, "num_inference_steps": 4, "height": 32, "width": 64}
    for factor, pipeline in pipelines.items():
        (image,) = sampler_of(pipeline).generate([ImageRequest("a", 5)], QUICK, size=(64, 32))
        expected = pipeline("a", generator=torch.Generator().manual_seed(5), **settings).images[0]
        assert same(image, expected), factor


def test_negative_prompt_equals_the_pipelines(pipelines: dict[int, AmusedPipeline], toy_sampler: AmusedSampler) -> None:
    found = [toy_sampler.tokens([ImageRequest("a", 1, text)], options(6.0, 5), (8, 8)) for text in ("", "the pokemon")]
    for text, ids in zip((None, "the pokemon"), found):
        settings = {"negative_prompt": text, "guidance_scale": 6.0, "num_inference_steps": 5}
        assert torch.equal(ids, theirs(pipelines[4], "a", 1, **settings))
    assert not torch.equal(*found)
    plain = [toy_sampler.tokens([ImageRequest("a", 1, text)], options(1.0, 5), (8, 8)) for text in ("", "the pokemon")]
    assert torch.equal(*plain)  # without guidance nothing leads away


def test_the_pipeline_masks_kept_tokens_again_at_a_high_temperature(
    pipelines: dict[int, AmusedPipeline], toy_sampler: AmusedSampler
) -> None:
    """It gives them the largest float as probability, of log 88.7, to which noise is added like to the others."""

    def kept_and_masked_again(steps: list[Tensor]) -> int:
        return sum(int(((old != MASK) & (new == MASK)).sum()) for old, new in pairwise(steps))

    theirs_, ours = [], []
    theirs(
        pipelines[4], "a", 0, guidance_scale=1.0, temperature=50, num_inference_steps=12,
        callback=lambda step, timestep, ids: theirs_.append(ids.clone()),
    )  # fmt: skip
    request = ImageRequest("a")
    toy_sampler.tokens([request], options(1.0, 12, 50.0), (8, 8), lambda ids: ours.append(ids.clone()))
    assert kept_and_masked_again(theirs_) > 0
    assert kept_and_masked_again(ours) == 0
    assert torch.equal(ours[0], theirs_[0])


# ------------------------------------------------------------------------------------- image to image, inpainting


def test_image_to_image_equals_the_pipeline(pipelines: dict[int, AmusedPipeline]) -> None:
    for factor, schedule in product((4, 16), ("cosine", "linear")):
        judge = with_schedule(pipelines[factor], schedule, AmusedImg2ImgPipeline)
        sampler, seed = sampler_of(judge), 0
        for (h, w), strength, guidance, steps in product(((8, 8), (4, 6)), (0.3, 0.5, 0.9), (1.0, 10.0), (6,)):
            image, seed = photo(w * factor, h * factor), seed + 1
            settings = {"strength": strength, "guidance_scale": guidance, "num_inference_steps": steps}
            expected = theirs(judge, "a cat", seed, image, **settings)
            request = ImageRequest("a cat", seed, image=image, strength=strength)
            ids = sampler.tokens([request], options(guidance, steps), (h, w))
            assert torch.equal(ids, expected), (factor, schedule, h, w, settings)
            assert not torch.equal(ids, sampler.encode(image, (h, w)))


def test_image_to_image_keeps_some_of_the_image(toy_sampler: AmusedSampler) -> None:
    image = photo(32, 32)
    encoded = toy_sampler.encode(image, (8, 8))
    kept = []
    for strength in (0.2, None, 0.8, 1.0):  # None: 0.5
        request = ImageRequest("a", 2, image=image, strength=strength)
        seen: list[Tensor] = []
        toy_sampler.tokens([request], options(1.0, 10), (8, 8), lambda ids, seen=seen: seen.append(ids.clone()))
        assert len(seen) == {0.2: 2, None: 5, 0.8: 8, 1.0: 10}[strength]
        kept.append(int((seen[-1] == encoded).sum()))
    assert kept[0] > kept[1] > kept[2] > kept[3]


def test_at_strength_1_everything_is_generated(
    pipelines: dict[int, AmusedPipeline], toy_sampler: AmusedSampler
) -> None:
    """The pipeline masks nothing then, and nearly returns the image."""
    image = photo(32, 32)
    encoded = toy_sampler.encode(image, (8, 8))
    judge = with_schedule(pipelines[4], "cosine", AmusedImg2ImgPipeline)
    expected = theirs(judge, "a", 1, image, strength=1.0, num_inference_steps=4)
    assert (expected == encoded).float().mean() > 0.9
    ids = toy_sampler.tokens([ImageRequest("a", 1, image=image, strength=1.0)], options(10.0, 4), (8, 8))
    assert torch.equal(ids, toy_sampler.tokens([ImageRequest("a", 1)], options(10.0, 4), (8, 8)))
    assert (ids == encoded).float().mean() < 0.2


def test_inpainting_equals_the_pipeline(pipelines: dict[int, AmusedPipeline]) -> None:
    for factor, grid in ((4, (8, 8)), (4, (8, 4)), (16, (16, 16))):
        judge = with_schedule(pipelines[factor], "cosine", AmusedInpaintPipeline)
        sampler, (h, w) = sampler_of(pipelines[factor]), grid
        image, encoded = photo(w * factor, h * factor), None
        for seed, (share, strength, guidance) in enumerate(product((0.2, 0.6, 1.0), (0.5, 1.0), (1.0, 10.0))):
            masked = np.random.default_rng(seed).random(grid) < share
            mask = mask_of(masked, factor)
            settings = {"strength": strength, "guidance_scale": guidance, "num_inference_steps": 6}
            expected = theirs(judge, "a cat", seed, image, mask, **settings)
            request = ImageRequest("a cat", seed, image=image, mask=mask, strength=strength)
            ids = sampler.tokens([request], options(guidance, 6), grid)
            assert torch.equal(ids, expected), (factor, grid, share, settings)
            encoded = sampler.encode(image, grid) if encoded is None else encoded
            assert torch.equal(ids[0][~masked], encoded[0][~masked])  # bit for bit
            assert not torch.equal(ids, encoded)


def test_inpainting_without_a_strength_takes_all_steps(toy_sampler: AmusedSampler) -> None:
    image, mask = photo(32, 32), mask_of(np.eye(8), 4)
    found = [
        toy_sampler.tokens([ImageRequest("a", 1, image=image, mask=mask, strength=strength)], options(1.0, 6), (8, 8))
        for strength in (None, 1.0, 0.5)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_inpainting_leaves_the_schedule_of_other_images(toy_sampler: AmusedSampler) -> None:
    """AmusedInpaintPipeline changes that of a shared scheduler to linear."""
    before = toy_sampler.tokens([ImageRequest("a")], QUICK, (8, 8))
    request = ImageRequest("a", image=photo(32, 32), mask=Image.new("L", (32, 32), 255))
    assert counts(toy_sampler, request, QUICK, (8, 8)) == [48, 32, 16, 0]  # linear
    assert torch.equal(toy_sampler.tokens([ImageRequest("a")], QUICK, (8, 8)), before)
    assert counts(toy_sampler, ImageRequest("a"), QUICK, (8, 8)) == [59, 45, 24, 0]  # cosine
    assert toy_sampler.masking_schedule == "cosine"


def test_an_empty_mask_returns_the_images_tokens(toy_sampler: AmusedSampler) -> None:
    image, rank = photo(32, 32), halton_rank(8, 8).view(8, 8).numpy()
    requests = [
        ImageRequest("a", image=image, mask=mask_of(masked, 4)) for masked in (np.zeros((8, 8)), rank < 1, rank < 9)
    ]
    encoded = toy_sampler.encode(image, (8, 8))
    assert torch.equal(toy_sampler.tokens(requests[:1], QUICK, (8, 8)), encoded)
    together = toy_sampler.tokens(requests, QUICK, (8, 8))
    for request, ids, most in zip(requests, together, (0, 1, 9)):
        assert torch.equal(ids[None], toy_sampler.tokens([request], QUICK, (8, 8)))
        assert int((ids != encoded).sum()) <= most


@pytest.mark.parametrize(("factor", "grid"), [(4, (6, 10)), (16, (4, 6))])
def test_inpainting_a_grid_that_the_pipeline_cannot(
    pipelines: dict[int, AmusedPipeline], factor: int, grid: tuple[int, int]
) -> None:
    """Its mask processor rounds the token grid's sides to a multiple of the pixels per token."""
    sampler, (h, w) = sampler_of(pipelines[factor]), grid
    image = photo(w * factor, h * factor)
    masked = np.random.default_rng(0).random(grid) < 0.5
    judge = with_schedule(pipelines[factor], "cosine", AmusedInpaintPipeline)
    with pytest.raises((RuntimeError, ValueError)):
        theirs(judge, "a", 3, image, mask_of(masked, factor), num_inference_steps=5)
    request = ImageRequest("a", 3, image=image, mask=mask_of(masked, factor))
    start = sampler.encode(image, grid)[0].masked_fill(torch.from_numpy(masked), MASK)
    expected = by_hand(pipelines[factor], request, [4.0] * 5, grid, start, "linear")
    assert torch.equal(sampler.tokens([request], options(4.0, 5), grid), expected)


def test_a_mask_of_another_size_and_mode(toy_sampler: AmusedSampler) -> None:
    masked = np.zeros((8, 8), dtype=bool)
    masked[2:6, 4:] = True
    image, mask = photo(32, 32), mask_of(masked, 4)
    alike = [mask, mask.resize((96, 96), Image.Resampling.NEAREST), mask.convert("RGB"), mask.convert("1")]
    found = [toy_sampler.tokens([ImageRequest("a", image=image, mask=one)], QUICK, (8, 8)) for one in alike]
    assert all(torch.equal(ids, found[0]) for ids in found)
    assert torch.equal(found[0][0][~masked], toy_sampler.encode(image, (8, 8))[0][~masked])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ImageRequest("a", mask=Image.new("L", (32, 32))), "a mask but no image"),
        (ImageRequest("a", image=Image.new("RGB", (32, 32)), strength=0.0), "strength got 0.0; expected"),
        (ImageRequest("a", image=Image.new("RGB", (32, 32)), strength=1.5), "strength got 1.5; expected"),
        (ImageRequest("a", image=Image.new("RGB", (32, 32)), strength=math.nan), "strength got nan; expected"),
        (ImageRequest("a", image=Image.new("RGB", (32, 32)), strength=0.2), "less than one step; expected .*0.25"),
    ],
)
def test_a_request_that_is_refused(toy_sampler: AmusedSampler, request_: ImageRequest, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(toy_sampler.generate([request_], QUICK))


# --------------------------------------------------------------------------------------------------- batches


def mixed(count: int = 7) -> list[ImageRequest]:
    """Requests whose prompts, seeds, negative prompts and images differ."""
    image, mask = photo(32, 32), mask_of(np.tri(8, k=-3), 4)
    requests = [ImageRequest(f"cat number {number}", 3 * number, "dog" * (number % 2)) for number in range(count)]
    requests[2] = replace(requests[2], image=image, mask=mask)  # starts at the first step, with fewer tokens
    requests[3] = replace(requests[3], image=image, mask=Image.new("L", (32, 32)))
    requests[4] = replace(requests[4], image=image, strength=0.5)  # starts later, so in another batch
    return requests


@pytest.mark.parametrize("settings", [QUICK, replace(QUICK, guidance_scale=1.0), replace(QUICK, order="halton")])
def test_an_image_does_not_depend_on_its_batch(toy_sampler: AmusedSampler, settings: GenerationOptions) -> None:
    requests = mixed()
    alone = [image for request in requests for image in toy_sampler.generate([request], settings)]
    assert len({image.tobytes() for image in alone}) == len(requests)
    for batch_size in (1, 2, 3, 7, None):
        images = list(toy_sampler.generate(requests, settings, batch_size=batch_size))
        assert len(images) == len(requests)
        assert all(same(left, right) for left, right in zip(images, alone)), batch_size
    for other in (requests[::-1], [requests[5], requests[0], requests[5]]):  # other neighbours
        images = list(toy_sampler.generate(other, settings))
        assert all(same(image, alone[requests.index(request)]) for request, image in zip(other, images))


def test_a_batchs_ids_are_those_generated_alone(pipelines: dict[int, AmusedPipeline]) -> None:
    for factor, pipeline in pipelines.items():
        sampler, requests = sampler_of(pipeline), [ImageRequest(f"a {number}", number) for number in range(33)]
        together = sampler.tokens(requests, options(2.0, 5), (4, 6))
        alone = [sampler.tokens([request], options(2.0, 5), (4, 6)) for request in requests]
        assert torch.equal(together, torch.cat(alone)), factor


def test_batches_are_bounded(toy_sampler: AmusedSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    handle = toy_sampler.transformer.embed.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    settings, requests = options(1.0, 1), [ImageRequest("a", seed) for seed in range(5)]
    try:
        list(toy_sampler.generate(requests, settings))
        list(toy_sampler.generate(requests, settings, batch_size=2))
        monkeypatch.setitem(sampling.TOKENS_AT_ONCE, "cpu", 3 * 64 + 10)
        list(toy_sampler.generate(requests, settings))
        list(toy_sampler.generate(requests, settings, size=(256, 256)))  # too large for any bound
    finally:
        handle.remove()
    assert sizes == [5, 2, 2, 1, 3, 2, 1, 1, 1, 1, 1]


def test_images_of_several_sizes(toy_sampler: AmusedSampler) -> None:
    """The size of a request's image, rounded down to the grid; `size` for all."""
    requests = [ImageRequest("a", image=photo(*size)) for size in ((32, 40), (47, 33), (3, 100))] + [ImageRequest("a")]
    assert [image.size for image in toy_sampler.generate(requests, QUICK)] == [(32, 40), (40, 32), (8, 96), (32, 32)]
    assert {image.size for image in toy_sampler.generate(requests, QUICK, size=(16, 24))} == {(16, 24)}


def test_a_size_off_the_grid_is_refused(toy_sampler: AmusedSampler) -> None:
    with pytest.raises(UserError, match="sides divisible by 8"):
        next(toy_sampler.generate([ImageRequest("a")], QUICK, size=(36, 32)))


def test_each_step_is_reported(toy_sampler: AmusedSampler) -> None:
    reports: list[int] = []
    list(toy_sampler.generate([ImageRequest("a")] * 3, QUICK, batch_size=2, on_step=reports.append))
    assert reports == [2, 2, 2, 2, 1, 1, 1, 1]


def test_text_is_encoded_once_per_distinct_prompt(toy_sampler: AmusedSampler) -> None:
    rows: list[int] = []
    handle = toy_sampler.text_encoder.register_forward_hook(lambda module, args, output: rows.append(1))
    try:
        requests = [ImageRequest(prompt, seed) for seed, prompt in enumerate(["a", "b", "a", "b", "a", "a"])]
        list(toy_sampler.generate(requests, options(1.0, 2), batch_size=2))
        assert len(rows) == 2
        list(toy_sampler.generate(requests, options(2.0, 2), batch_size=2))
        assert len(rows) == 3  # the empty one
        list(toy_sampler.generate([replace(requests[0], negative_prompt="b")], options(2.0, 2)))
        assert len(rows) == 3
    finally:
        handle.remove()


def test_conditions_are_computed_once(toy_sampler: AmusedSampler) -> None:
    """Not at every step; the passes are equal to the bit, and the transformer is the same afterwards."""
    transformer, calls = toy_sampler.transformer, []
    modules = {name: dict(vars(module)) for name, module in transformer.named_modules()}
    text = toy_sampler._text(["a", "b"])
    given = torch.full((2, 8, 8), MASK), torch.tensor([[32.0, 32, 0, 0, 6]]).expand(2, -1), *text
    linear, several = torch.nn.functional.linear, (given[0], given[0], given[0] * 0)

    class Count(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls[-1] += function is linear
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Count(), conditions_once(transformer):
        outputs = []
        for ids in several:
            calls.append(0)
            outputs.append(trunk(transformer, ids, *given[1:]))
    assert calls[1] == calls[2] < 0.75 * calls[0]
    with torch.no_grad():
        assert torch.equal(outputs[0], trunk(transformer, *given))
        assert torch.equal(outputs[2], trunk(transformer, given[0] * 0, *given[1:]))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert {name: dict(vars(module)) for name, module in transformer.named_modules()} == modules


def test_the_head_sees_only_masked_rows(pipelines: dict[int, AmusedPipeline]) -> None:
    sampler, rows = sampler_of(pipelines[16]), []
    handle = sampler.transformer.mlm_layer.register_forward_hook(
        lambda module, args, output: rows.append(args[0].shape[2])
    )
    try:
        settings = options(1.0, 4, masking_schedule="linear")
        sampler.tokens([ImageRequest("a")], settings, (16, 16))
        sampler.tokens([ImageRequest("a")] * 2, replace(settings, guidance_scale=2.0), (16, 16))
    finally:
        handle.remove()
    assert rows == [256, 192, 128, 64, 1024, 768, 512, 256]


def test_global_random_state_is_left_alone(toy_sampler: AmusedSampler) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    list(toy_sampler.generate(mixed(), QUICK))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    torch.manual_seed(7)
    first = toy_sampler.tokens([ImageRequest("a")], QUICK, (8, 8))
    torch.manual_seed(8)
    assert torch.equal(toy_sampler.tokens([ImageRequest("a")], QUICK, (8, 8)), first)
    torch.set_rng_state(before[0])


# --------------------------------------------------------------------------------- guidance, order, schedules


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        (options(9.0, 5), [9, 9, 9, 9, 9]),
        (options(9.0, 5, guidance_schedule="linear"), [1, 3, 5, 7, 9]),
        (options(9.0, 1, guidance_schedule="linear"), [9]),
        (options(9.0, 8, guidance_interval=(0.25, 0.75)), [1, 1, 9, 9, 9, 9, 1, 1]),
        (options(5.0, 4, guidance_interval=(0.0, 0.5)), [5, 5, 1, 1]),
        (options(9.0, 5, guidance_schedule="linear", guidance_interval=(0.4, 1.0)), [1, 1, 5, 7, 9]),
        (options(0.0, 3), [1, 1, 1]),
    ],
)
def test_guidance_by_step(pipelines: dict[int, AmusedPipeline], settings: GenerationOptions, scales: list) -> None:
    request = ImageRequest("yoda pokemon", 11, "the cat")
    ids = sampler_of(pipelines[4]).tokens([request], settings, (6, 4))
    assert torch.equal(ids, by_hand(pipelines[4], request, scales, (6, 4)))
    assert [settings.guidance_at(step) for step in range(len(scales))] == scales


def test_steps_without_guidance_take_half_the_rows(toy_sampler: AmusedSampler) -> None:
    rows: list[int] = []
    handle = toy_sampler.transformer.embed.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    try:
        settings = options(3.0, 4, guidance_interval=(0.0, 0.5))
        toy_sampler.tokens([ImageRequest("a"), ImageRequest("b")], settings, (8, 8))
    finally:
        handle.remove()
    assert rows == [4, 4, 2, 2]


def test_the_usual_guidance() -> None:
    assert [usual_guidance(side) for side in (32, 255, 256, 511, 512, 1024)] == [2, 2, 4, 4, 10, 10]


def test_guidance_follows_the_model(pipelines: dict[int, AmusedPipeline]) -> None:
    request, grid = ImageRequest("a", 4), (4, 4)
    for factor, scale in ((4, 2.0), (16, 4.0)):
        sampler = sampler_of(pipelines[factor])
        assert sampler.guidance_scale == scale
        ids = sampler.tokens([request], GenerationOptions(num_inference_steps=4), grid)
        assert torch.equal(ids, sampler.tokens([request], options(scale, 4), grid))
    given = AmusedSampler(**pipelines[4].components, guidance_scale=1.0)
    assert given.guidance_scale == 1.0


def scalar_halton(h: int, w: int) -> list[int]:
    """When each position is first hit: exact fractions, one number at a time."""

    def inverse(number: int, base: int) -> Fraction:
        value, share = Fraction(0), Fraction(1, base)
        while number:
            value += number % base * share
            number, share = number // base, share / base
        return value

    order: dict[int, int] = {}
    number = 1
    while len(order) < h * w:
        position = int(inverse(number, 2) * h) * w + int(inverse(number, 3) * w)
        order.setdefault(position, len(order))
        number += 1
    return [order[position] for position in range(h * w)]


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (4, 4), (8, 8), (4, 6), (10, 3), (5, 27), (16, 18), (9, 9), (16, 24)])
def test_halton_rank(grid: tuple[int, int]) -> None:
    assert halton_rank(*grid).tolist() == scalar_halton(*grid)


def test_halton_order_keeps_positions_in_their_order(toy_sampler: AmusedSampler) -> None:
    for grid in ((8, 8), (4, 10)):
        rank = halton_rank(*grid).view(grid)
        for seed in (0, 1):
            seen: list[Tensor] = []
            settings = options(1.0, 7, order="halton", masking_schedule="linear")
            toy_sampler.tokens(
                [ImageRequest("a", seed)], settings, grid, lambda ids, seen=seen: seen.append(ids[0] + 0)
            )
            for step, ids in enumerate(seen, start=1):
                kept = math.prod(grid) - math.floor(math.prod(grid) * (1 - step / 7))
                assert torch.equal(ids != MASK, rank < kept)


@pytest.mark.parametrize("steps", [2, 7, 11])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "arccos"])
def test_masking_schedules(toy_sampler: AmusedSampler, schedule: Any, steps: int) -> None:
    """How many of 96 tokens are masked after each step; at least one fewer each time."""

    def share(r: float) -> float:
        return {"cosine": math.cos(math.pi * r / 2), "linear": 1 - r, "arccos": math.acos(r) / (math.pi / 2)}[schedule]

    expected = [math.floor(96 * share(step / steps) + 1e-6) for step in range(1, steps)]
    found = counts(toy_sampler, ImageRequest("a", 3), options(1.0, steps, masking_schedule=schedule), (8, 12))
    assert found == [*expected, 0]
    assert [float(masked_share(step, steps, schedule)) for step in range(steps + 1)] == pytest.approx(
        [share(step / steps) for step in range(steps + 1)], abs=1e-6
    )


def test_at_least_one_token_is_decided_per_step(toy_sampler: AmusedSampler) -> None:
    for schedule in ("cosine", "arccos"):  # which would keep none of 16 at first
        found = counts(toy_sampler, ImageRequest("a"), options(1.0, 16, masking_schedule=schedule), (4, 4))
        assert all(later < earlier for earlier, later in zip([16, *found], found))
        assert found[-1] == 0


# ---------------------------------------------------------------------------------------------------- precision


def in_dtype(pipeline: AmusedPipeline, dtype: torch.dtype) -> AmusedPipeline:
    """A copy whose text encoder and transformer are in a dtype."""
    modules = {
        name: type(module).from_config(module.config) if name == "transformer" else type(module)(module.config)
        for name, module in pipeline.components.items()
        if name in ("transformer", "text_encoder")
    }
    for name, module in modules.items():
        module.load_state_dict(getattr(pipeline, name).state_dict())
        module.to(dtype).eval()
    other = AmusedPipeline(**{**pipeline.components, **modules})
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_masks_what_the_schedule_says(pipelines: dict[int, AmusedPipeline], dtype: torch.dtype) -> None:
    """The pipeline does not: see the next test for why."""
    low = in_dtype(pipelines[16], dtype)
    sampler = sampler_of(low)
    expected = [math.floor(256 * math.cos(math.pi / 2 * step / 7)) for step in range(1, 7)] + [0]
    for seed, temperature in product((1, 2, 3), ((0.0, 0.0), (2.0, 0.0))):
        assert counts(sampler, ImageRequest("a cat", seed), options(1.0, 7, temperature), (16, 16)) == expected
    wrong = 0
    for seed in (1, 2, 3):
        seen: list[int] = []
        theirs(
            low, "a cat", seed, guidance_scale=1.0, num_inference_steps=7, temperature=(0.0, 0.0),
            callback=lambda step, timestep, ids, seen=seen: seen.append(int((ids == MASK).sum())),
        )  # fmt: skip
        wrong += seen != expected
    assert wrong >= 2


def test_why_the_schedulers_count_is_wrong_in_half_precision() -> None:
    probs = torch.rand(1, 256, generator=torch.Generator().manual_seed(0))
    length = torch.tensor([[100.0]])
    assert int(mask_by_random_topk(length, probs, 0.0).sum()) == 100
    ties = probs.bfloat16()
    assert len(ties.unique()) < 256
    assert sum(int(mask_by_random_topk(length + more, ties, 0.0).sum()) < 100 + more for more in range(10)) > 0
    # 1e-20 is 0 in fp16, so noise of 0 becomes -inf, and -inf * 0 NaN, which is never below the cut-off
    noise = gumbel_noise(torch.zeros(1, 65536, dtype=torch.float16), torch.Generator().manual_seed(0))
    assert not noise.isfinite().all()
    assert (0.0 * noise).isnan().any()
    assert gumbel_noise(torch.zeros(1, 65536), torch.Generator().manual_seed(0)).isfinite().all()


def test_moving_to_another_dtype_encodes_the_text_again(pipelines: dict[int, AmusedPipeline]) -> None:
    sampler = sampler_of(in_dtype(pipelines[4], torch.float32))
    before = sampler.tokens([ImageRequest("a")], QUICK, (8, 8))
    assert torch.equal(before, sampler_of(pipelines[4]).tokens([ImageRequest("a")], QUICK, (8, 8)))
    sampler.to("cpu", torch.bfloat16)
    assert sampler.transformer.dtype == sampler.text_encoder.dtype == torch.bfloat16
    assert sampler.vqvae.dtype == torch.float32
    low = sampler_of(in_dtype(pipelines[4], torch.bfloat16)).tokens([ImageRequest("a")], QUICK, (8, 8))
    assert torch.equal(sampler.tokens([ImageRequest("a")], QUICK, (8, 8)), low)


def test_outputs_that_are_not_finite(pipelines: dict[int, AmusedPipeline]) -> None:
    broken = in_dtype(pipelines[4], torch.float32)
    with torch.no_grad():
        broken.transformer.mlm_layer.conv2.weight[5] = math.nan
    with pytest.raises(NotFinite, match="not finite, so it generates nothing; train with a lower learning rate"):
        list(sampler_of(broken).generate([ImageRequest("a")], QUICK))
    with pytest.raises(NotFinite):
        sampler_of(broken).generate_steps(ImageRequest("a"), QUICK)


# ------------------------------------------------------------------------------------------ options and the rest


def test_more_steps_than_tokens_are_refused(toy_sampler: AmusedSampler) -> None:
    with pytest.raises(UserError, match="got 65 steps for 8x8 tokens; expected at most one step per token"):
        toy_sampler.tokens([ImageRequest("a")], options(1.0, 65), (8, 8))
    assert counts(toy_sampler, ImageRequest("a"), options(1.0, 16), (4, 4))[-1] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps got 0; expected at least 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps got 2.5"),
        ({"guidance_scale": -1.0}, "guidance_scale got -1.0; expected a number from 0"),
        ({"guidance_scale": math.inf}, "guidance_scale got inf"),
        ({"guidance_scale": math.nan}, "guidance_scale got nan"),
        ({"temperature": -1.0}, "temperature got -1.0; expected a number from 0, or two"),
        ({"temperature": (2.0, math.nan)}, "temperature got"),
        ({"temperature": (math.inf, 0.0)}, "temperature got"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval got .*expected two rising numbers"),
        ({"guidance_interval": (-0.1, 0.5)}, "guidance_interval got"),
        ({"guidance_interval": (0.0, 1.5)}, "guidance_interval got"),
        ({"guidance_interval": (0.0, math.nan)}, "guidance_interval got"),
        ({"guidance_interval": (0.5,)}, "guidance_interval got"),
        ({"order": "random"}, "order got 'random'; expected one of confidence, halton"),
        ({"order": None}, "order got None"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule got 'cosine'; expected one of constant, linear"),
        ({"masking_schedule": "square"}, "masking_schedule got 'square'; expected one of cosine, linear, arccos"),
    ],
)
def test_options_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerationOptions(**settings)


@pytest.mark.parametrize("temperature", [(1.0,), (1.0, 2.0, 3.0), "hot"])
def test_a_temperature_of_another_shape_is_refused(temperature: Any) -> None:
    with pytest.raises(UserError, match=r"temperature got .*; expected a number from 0, or two"):
        GenerationOptions(temperature=temperature)


def test_options_have_the_pipelines_defaults() -> None:
    settings = GenerationOptions()
    assert (settings.num_inference_steps, settings.guidance_scale, settings.order) == (12, None, "confidence")
    assert torch.equal(settings.temperatures, torch.linspace(2, 0, 12))
    assert torch.equal(GenerationOptions(temperature=3).temperatures, torch.linspace(3, 0.01, 12))


def test_what_is_cut_of_a_long_prompt(toy_sampler: AmusedSampler) -> None:
    assert toy_sampler.cut("a cat") == ""
    assert toy_sampler.cut(" ".join("x" * 62)) == ""  # 64 tokens with start and end
    assert toy_sampler.cut(" ".join("x" * 62) + " the dog") == "the dog"
    long, cut = " ".join("x" * 62) + " pokemon", " ".join("x" * 62)
    both = [toy_sampler.tokens([ImageRequest(prompt)], QUICK, (8, 8)) for prompt in (long, cut)]
    assert torch.equal(*both)


def test_images_after_each_step(toy_sampler: AmusedSampler) -> None:
    steps = toy_sampler.generate_steps(ImageRequest("a", 2), QUICK, (32, 16))
    assert [image.size for image in steps] == [(32, 16)] * 4
    (last,) = toy_sampler.generate([ImageRequest("a", 2)], QUICK, (32, 16))
    assert same(steps[-1], last)
    assert len({image.tobytes() for image in steps}) == 4


def test_reconstruct(pipelines: dict[int, AmusedPipeline], toy_sampler: AmusedSampler) -> None:
    """The image of the tokens of an image, cut to the grid."""
    image = photo(40, 32)
    (shown, other) = toy_sampler.reconstruct([image, photo(32, 32)])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        latents = pipelines[4].vqvae.encode(pixels).latents
        expected = pipelines[4].vqvae.decode(latents).sample.clamp(0, 1)
    difference = np.asarray(shown).astype(float) - expected[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(difference).max() < 1.01
    assert (shown.size, other.size) == ((40, 32), (32, 32))
