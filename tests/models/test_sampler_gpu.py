"""The sampler on a GPU: run by `make gpu`."""

from pathlib import Path

import pytest
import torch

from diffengine.models.generation import GenerationOptions, ImageRequest
from diffengine.models.pipelines import open_pipeline

pytestmark = pytest.mark.gpu

REQUESTS = [ImageRequest(prompt, seed) for seed, prompt in enumerate(["a cat", "a dog", "", "a red bird"])]
OPTIONS = GenerationOptions(3.0, 6)


def test_exact_noise_gives_the_cpus_tokens(toy: Path) -> None:
    options = GenerationOptions(3.0, 6, exact=True)
    host = open_pipeline(str(toy)).tokens(REQUESTS, options, (8, 8))
    device = open_pipeline(str(toy)).to("cuda").tokens(REQUESTS, options, (8, 8))
    assert (device.cpu() == host).float().mean() > 0.99  # to rounding


def test_graphs_change_nothing(toy: Path) -> None:
    sampler = open_pipeline(str(toy)).to("cuda")
    replayed = [sampler.tokens(REQUESTS, OPTIONS, (8, 8)) for _ in range(2)]
    assert torch.equal(*replayed)
    assert len(sampler._trunk._graphs) == 1  # the same shape at all steps
    sampler._trunk = sampler._trunk._function
    assert torch.equal(sampler.tokens(REQUESTS, OPTIONS, (8, 8)), replayed[0])


def test_an_image_does_not_depend_on_its_batch(toy: Path) -> None:
    sampler = open_pipeline(str(toy)).to("cuda")
    together = sampler.tokens(REQUESTS, OPTIONS, (8, 8))
    alone = torch.cat([sampler.tokens([request], OPTIONS, (8, 8)) for request in REQUESTS])
    assert (together == alone).float().mean() > 0.99  # matrix products round differently by batch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(toy: Path, dtype: torch.dtype) -> None:
    sampler = open_pipeline(str(toy)).to("cuda", dtype)
    images = list(sampler.generate(REQUESTS, OPTIONS))
    assert len(images) == 4
    assert {image.size for image in images} == {(32, 32)}


def test_the_host_never_waits_between_steps(toy: Path) -> None:
    sampler = open_pipeline(str(toy)).to("cuda")
    sampler.tokens(REQUESTS, OPTIONS, (8, 8))  # records the graph
    steps = []

    def forbid(ids: torch.Tensor) -> None:
        steps.append(len(steps))
        torch.cuda.set_sync_debug_mode("error" if len(steps) < OPTIONS.num_inference_steps else "default")

    try:
        sampler.tokens(REQUESTS, OPTIONS, (8, 8), forbid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 6
