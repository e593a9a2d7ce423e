"""Training runs with adapters: save, resume, two ranks, and the export at the end of a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UVit2DModel

from diffengine import cli
from diffengine.engine import checkpoint
from tests.engine import runs
from tests.engine.runs import Toy
from tests.support import models, photos

MODEL = """
from peft import LoKrConfig, LoraConfig

model = dict(
    train=[],
    gradient_checkpointing=True,
    adapters=dict(
        transformer=dict(type=LoraConfig, r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["to_q"]),
        text_encoder=dict(type=LoKrConfig, r=2, target_modules=["q_proj"]),
    ),
)
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    root = tmp_path_factory.mktemp("toy")
    photos.write_photo_folder(root / "photos", 6)
    return Toy(models.make_model_folder(root / "model", "toy"), root / "photos", root)


def lora(toy: Toy, name: str = "lora", **settings: Any) -> str:
    path = Path(toy.config(name, **settings))
    path.write_text(path.read_text() + MODEL)
    return str(path)


def test_resumed_run_equals_uninterrupted_run(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = lora(toy, max_iters=4, checkpoint_every=2)
    assert runs.train(path, tmp_path / "whole") == 0
    assert runs.train(path, tmp_path / "rest", "--resume", str(tmp_path / "whole" / "iter_2.pth")) == 0
    runs.assert_equal_checkpoints(tmp_path / "whole" / "iter_4.pth", tmp_path / "rest" / "iter_4.pth")
    state = checkpoint.read(tmp_path / "whole" / "iter_4.pth")["model"]
    assert all("lora_" in name or "lokr_" in name for name in state)
    folder = tmp_path / "whole" / "transformer"  # exported at the end of the run
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 8
    loaded = UVit2DModel.from_pretrained(toy.model / "transformer")
    loaded.load_lora_adapter(str(folder), weight_name="pytorch_lora_weights.safetensors")
    capsys.readouterr()
    argv = ["convert", path, str(tmp_path / "whole" / "iter_4.pth"), str(tmp_path / "out")]
    assert cli.main(argv) == 0
    output = capsys.readouterr().out
    assert "loaded back: its outputs differ from the live model's by at most" in output
    assert "transformer.load_lora_adapter(" in output
    for name in ("transformer", "text_encoder"):
        weights = f"{name}/adapter_model.safetensors"
        assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert cli.main([*argv[:3], str(tmp_path / "merged"), "--merge", "--dtype", "bf16"]) == 0
    UVit2DModel.from_pretrained(tmp_path / "merged" / "transformer")
    assert cli.main([*argv[:3], str(tmp_path / "pipeline"), "--pipeline", "--dtype", "fp16"]) == 0
    assert "AmusedPipeline.from_pretrained(" in capsys.readouterr().out
    assert cli.main([*argv, "--pipeline", "--merge"]) == 2
    assert "--pipeline merges adapters by itself" in capsys.readouterr().err


def _first_step(toy: Toy, out: Path, name: str) -> None:
    from diffengine import distributed

    rank = distributed.rank()
    path = lora(toy, f"{name}{rank}")
    Path(path).write_text(Path(path).read_text().replace("lora_dropout=0.1", "lora_dropout=0.0"))
    step = runs.first_step(path, out / name)
    torch.save(vars(step), out / f"{name}{rank}.pt")


@pytest.mark.soak  # as tests/engine/test_split.py has of a run without adapters
def test_two_ranks_take_the_same_step_as_one(toy: Toy, tmp_path: Path) -> None:
    """DDP finds a gradient for every adapter; the base has none."""
    runs.on_ranks(1, _first_step, toy, tmp_path, "one")
    runs.on_ranks(2, _first_step, toy, tmp_path, "two")
    one, two = (torch.load(tmp_path / f"{name}0.pt", weights_only=True) for name in ("one", "two"))
    assert len(one["grads"]) == len(two["grads"])
    for grad_one, grad_two in zip(one["grads"], two["grads"]):
        assert (grad_one - grad_two).abs().max() <= 1e-5 * grad_two.abs().max().clamp_min(1e-4)
