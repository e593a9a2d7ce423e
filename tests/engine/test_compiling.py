"""When blocks are compiled, what the log reports, and that a compiled run resumes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from diffengine.engine.compiling import PAYS_FROM, compile_model
from diffengine.errors import UserError
from diffengine.models.amused import AmusedModel
from tests.engine import runs
from tests.engine.runs import CPU, Toy, assert_equal_checkpoints

pytestmark = pytest.mark.filterwarnings(  # raised by dynamo
    "ignore:The .grad attribute of a Tensor that is not:UserWarning"
)
CUDA = torch.device("cuda")
BLOCKS, BLOCK_TYPES = 2 * 2 + 2, 3  # how many the toy model has


@pytest.fixture(scope="module")
def model(toy: Toy) -> AmusedModel:
    return AmusedModel(str(toy.model))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


def test_auto_depends_on_the_device_and_the_number_of_steps(model: AmusedModel) -> None:
    assert compile_model("auto", model, 10**6, CPU) == "eager (auto, on a CPU)"
    assert compile_model(False, model, 10**6, CUDA) == "eager (as configured)"
    assert compile_model("auto", model, PAYS_FROM - 1, CUDA) == (
        "eager (auto, compiling pays from 1000 steps on and there are 999)"
    )
    assert compile_model(True, model, 1, CPU) == f"compiled, {BLOCKS} of them (as configured)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_triton(model: AmusedModel) -> None:
    assert compile_model("auto", model, PAYS_FROM, CUDA) == (
        "eager (auto, this machine has no Triton that works with this GPU)"
    )


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler(toy: Toy, tmp_path: Path) -> None:
    path = toy.config("no_compiler", prompts=1)
    with pytest.raises(UserError) as error:
        runs.build(path, tmp_path / "run", "compile=True")
    assert str(error.value) == (
        "compile got True, but this machine has no compiler (g++, clang++ or CXX); install it, "
        "or set --cfg-options compile=auto"
    )
    assert not (tmp_path / "run" / "config.py").exists()


def test_a_model_without_blocks(toy: Toy, tmp_path: Path) -> None:
    path = toy.vq_config("vq_compiled", max_iters=1, log_every=1)
    with pytest.raises(UserError, match="this model has no blocks to compile; set --cfg-options compile=False"):
        runs.build(path, tmp_path, "train_cfg.compile=True")


def test_the_log_reports_how_blocks_run(toy: Toy, tmp_path: Path) -> None:
    for index, (option, expected) in enumerate(
        [("True", f"compiled, {BLOCKS} of them (as configured)"), ("auto", "eager (auto, on a CPU)")]
    ):
        path = toy.config(f"compiled{index}")
        runner = runs.build(path, tmp_path / option, f"compile={option}")
        runner.announce()
        assert f"blocks run {expected}" in (tmp_path / option / "log.txt").read_text()
        assert runner.config["compile"] == (option if option == "auto" else True)


@pytest.mark.soak
def test_a_compiled_run_resumes(toy: Toy, tmp_path: Path) -> None:
    """With dropout, previews and micro-batches of two sizes: bit-identical. It can also resume without compiling."""
    torch._dynamo.reset()
    settings = {"max_iters": 4, "batch_size": 3, "micro_batch_size": 2, "checkpoint_every": 2}
    path = toy.config("compiled", **settings, compile=True, prompts=["a cat"], preview_every=2)

    def train(work_dir: Path, *options: str, resume: Path | None = None) -> int:
        """Train; returns how many graphs dynamo compiled."""
        runner = runs.build(path, work_dir, *options, resume=resume)
        for module in runner.trainable.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        runner.train()
        return torch._dynamo.utils.counters["stats"]["unique_graphs"] - before

    assert train(tmp_path / "whole") == 2 * BLOCK_TYPES  # graphs for 1 and for 2 images
    assert train(tmp_path / "resumed", "max_iters=2") == 0
    assert train(tmp_path / "resumed", resume=tmp_path / "resumed/iter_2.pth") == 0
    assert_equal_checkpoints(tmp_path / "resumed/iter_4.pth", tmp_path / "whole/iter_4.pth")
    torch._dynamo.reset()
    eager = train(tmp_path / "resumed", "compile=False", "max_iters=5", resume=tmp_path / "resumed/iter_4.pth")
    assert eager == 0
