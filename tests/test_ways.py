"""Every way to train, at toy size: train, kill, resume, convert, load in diffusers, generate.

To test another one, add a line to `WAYS`. Those that resemble another one are `SOAK`.
"""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AmusedPipeline

from diffengine import cli, config
from diffengine.engine import checkpoint
from diffengine.engine.state import model_of
from diffengine.models.base import MaskedImageModel
from tests.engine.runs import assert_equal_checkpoints, in_child, signal_at
from tests.support import models, photos

LORA = "type=LoraConfig, r=4, lora_alpha=8, target_modules=['to_q', 'to_k', 'to_v']"

# name -> (base config, added lines)
WAYS = {
    "full": ("amused_512_own", ""),
    "both": ("amused_512_own", "model = dict(train=['transformer', 'text_encoder'])"),
    "text_encoder": ("amused_512_own", "model = dict(train=['text_encoder'])"),
    "256": ("amused_256_own", ""),
    "micro_batches": ("amused_512_own", "micro_batch_size = 2"),
    "checkpointing": ("amused_512_own", "gradient_checkpointing = True"),
    "8bit": ("amused_512_minecraft_8bit", ""),
    "lion": ("amused_512_own", "optim_wrapper = dict(optimizer=dict(type=Lion, lr=1e-4))"),
    "ema": ("amused_512_own", "custom_hooks = [dict(type=EMAHook, decay=0.9)]"),
    "warm_up": ("amused_512_own", "lr_schedule = 'cosine'\nwarmup_iters = 2"),
    "lora": ("amused_512_own_lora", ""),
    "rslora": (
        "amused_512_own",
        f"model = dict(train=[], adapters=dict(transformer=dict({LORA}, use_rslora=True)))",
    ),
    "dora": (
        "amused_512_own",
        f"model = dict(train=[], adapters=dict(transformer=dict({LORA}, use_dora=True)))",
    ),
    "alpha_pattern": (
        "amused_512_own",
        f"model = dict(train=[], adapters=dict(transformer=dict({LORA}, alpha_pattern={{'to_q': 2}})))",
    ),
    "lokr": (
        "amused_512_own",
        "model = dict(train=[], adapters=dict(transformer=dict(type=LoKrConfig, r=4, target_modules=['to_q'])))",
    ),
    "loha": (
        "amused_512_own",
        "model = dict(train=[], adapters=dict(transformer=dict(type=LoHaConfig, r=4, target_modules=['to_q'])))",
    ),
    "lora_on_both": (
        "amused_512_own",
        f"model = dict(train=[], adapters=dict(transformer=dict({LORA}), "
        "text_encoder=dict(type=LoraConfig, r=2, target_modules=['q_proj', 'v_proj'])))",
    ),
    "lora_and_text_encoder": (
        "amused_512_own",
        f"model = dict(train=['text_encoder'], adapters=dict(transformer=dict({LORA})))",
    ),
    "styledrop": ("amused_512_styledrop", "data = {photo!r}"),
    "dreambooth": (
        "amused_512_dreambooth_lora",
        "class_data = {class_data!r}\nnum_class_images = 2\nbatch_size = 4",
    ),
}

SOAK = {"lion", "warm_up", "rslora", "alpha_pattern", "loha", "lokr", "dora", "both", "256", "micro_batches",
        "lora_and_text_encoder", "lora_on_both", "styledrop", "checkpointing"}  # fmt: skip

CONFIG = """
from diffengine.engine.hooks import EMAHook
from lion_pytorch import Lion
from peft import LoHaConfig, LoKrConfig, LoraConfig

extends = {extends!r}
data = {data!r}
pretrained = {model!r}
resolution = 32
batch_size = 4
max_iters = 4
num_workers = 0
prompts = ["a cat"]
preview_every = None
validation_every = 0
checkpoint_every = 2
log_every = 1
{more}
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ways")
    models.make_model_folder(root / "model", "toy")
    photos.write_photo_folder(root / "photos", n=6, size=48)
    return root


def write_config(toy: Path, way: str, tmp_path: Path) -> str:
    """Writes the config of a way and returns its path."""
    extends, more = WAYS[way]
    more = more.replace("{photo!r}", repr(str(toy / "photos" / "cat.png")))
    more = more.replace("{class_data!r}", repr(str(tmp_path / "class")))
    path = tmp_path / f"{way}.py"
    text = CONFIG.format(extends=extends, data=str(toy / "photos"), model=str(toy / "model"), more=more)
    path.write_text(text, encoding="utf-8")
    return str(path)


def train(path: str, work_dir: Path, *flags: str) -> int:
    return cli.main(["train", path, "--work-dir", str(work_dir), *flags])


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.soak] * (way in SOAK)) for way in WAYS])
def test_way_from_training_to_generation(toy: Path, way: str, tmp_path: Path) -> None:
    path = write_config(toy, way, tmp_path)
    complete, killed = tmp_path / "complete", tmp_path / "killed"
    assert train(path, complete) == 0
    assert in_child(train, path, killed, "--cfg-options", signal_at(3, signal.SIGKILL)) == -signal.SIGKILL
    assert [file.name for file in killed.glob("*.pth")] == ["iter_2.pth"]
    assert train(path, killed, "--resume") == 0
    assert_equal_checkpoints(complete / "iter_4.pth", killed / "iter_4.pth")

    out = tmp_path / "pipeline"
    assert cli.main(["convert", path, str(killed / "iter_4.pth"), str(out), "--pipeline"]) == 0
    live = live_model(killed / "iter_4.pth")
    loaded = AmusedPipeline.from_pretrained(out)
    assert_same_weights(live, loaded)
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0}
    image = np.asarray(models.pipeline_image(loaded, "a cat", seed=1, **options))
    expected = np.asarray(models.pipeline_image(live.build_pipeline(), "a cat", seed=1, **options))
    assert np.abs(image.astype(int) - expected).max() <= 1  # merging an adapter rounds
    base = AmusedPipeline.from_pretrained(toy / "model")
    trained = {"transformer", "text_encoder"} & set(live.exportable)
    for name in trained:
        assert not all(map(torch.equal, getattr(loaded, name).parameters(), getattr(base, name).parameters()))


def live_model(path: Path) -> MaskedImageModel:
    """The model of a checkpoint, with its adapters."""
    state = checkpoint.read(path)
    model = model_of(state, config.resolve(json.loads(state["config"])), str(path))
    assert isinstance(model, MaskedImageModel)
    return model


@torch.no_grad()
def assert_same_weights(live: MaskedImageModel, loaded: AmusedPipeline) -> None:
    """Fully trained components are equal bit for bit. Merged adapters give equal logits up to rounding."""
    pipeline = live.build_pipeline()
    for name in live.exportable:
        expected, got = getattr(pipeline, name).state_dict(), getattr(loaded, name).state_dict()
        if expected.keys() == got.keys():
            assert all(torch.equal(expected[key], got[key]) for key in expected)
    generator = torch.Generator().manual_seed(0)
    transformer = loaded.transformer
    inputs = {
        "input_ids": torch.randint(transformer.config.codebook_size, (2, 8, 8), generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, transformer.config.encoder_hidden_size, generator=generator),
        "pooled_text_emb": torch.randn(2, transformer.config.cond_embed_dim, generator=generator),
        "micro_conds": torch.tensor([[32.0, 32, 0, 0, 6]] * 2),
    }
    expected_logits, got_logits = pipeline.transformer(**inputs), transformer(**inputs)
    assert (expected_logits - got_logits).abs().max() <= 1e-5 * expected_logits.abs().max()
