"""Exported adapters load in peft and diffusers at full strength; merged ones load as plain weights."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AmusedPipeline, UVit2DModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from diffengine import cli, export
from diffengine.errors import UserError
from diffengine.export import export_components, export_pipeline
from diffengine.models import adapters
from diffengine.models.amused import AmusedModel
from diffengine.models.frozen import evaluating
from tests.models.test_adapters import LORA, TEXT, WAYS, adapter
from tests.support import models

WEIGHTS = "pytorch_lora_weights.safetensors"
TOLERANCE = 1e-6  # of the largest logit; the sums are the same, so the difference is usually 0


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_model_folder(tmp_path_factory.mktemp("model") / "toy", "toy")


def trained(toy: Path, **options: Any) -> AmusedModel:
    """A model whose adapters change its output."""
    model = AmusedModel(str(toy), **options)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.1)
    return model.train()


def logits(transformer: nn.Module) -> Tensor:
    rng = torch.Generator().manual_seed(2)
    ids = torch.randint(64, (2, 8, 8), generator=rng)
    text, pooled = torch.randn(2, 64, 48, generator=rng), torch.randn(2, 40, generator=rng)
    with evaluating(transformer):
        return transformer(ids, text, pooled, torch.rand(2, 5, generator=rng))


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def base(toy: Path) -> UVit2DModel:
    return UVit2DModel.from_pretrained(toy / "transformer")


def load_with_diffusers(toy: Path, folder: Path) -> UVit2DModel:
    loaded = base(toy)
    loaded.load_lora_adapter(str(folder), weight_name=WEIGHTS)
    return loaded


@pytest.mark.parametrize("way", WAYS)
def test_peft_and_diffusers_load_at_full_strength(toy: Path, tmp_path: Path, way: str) -> None:
    model = trained(toy, adapters={"transformer": adapter(way)})
    (exported,) = export_components(model, tmp_path)
    folder, live = tmp_path / "transformer", logits(model.transformer)
    assert exported.folder == folder
    assert exported.relative <= TOLERANCE
    assert difference(logits(base(toy)), live) > 1e-3  # the adapter has an effect
    assert difference(logits(PeftModel.from_pretrained(base(toy), folder)), live) <= TOLERANCE
    ours = base(toy)
    adapters.put_on(ours, folder, "transformer")
    assert difference(logits(ours), live) <= TOLERANCE
    files = {"adapter_config.json", "adapter_model.safetensors"}
    if way in ("loha", "oft", "ia3"):
        assert {file.name for file in folder.iterdir()} == files
    else:
        assert {file.name for file in folder.iterdir()} == files | {WEIGHTS}
        assert difference(logits(load_with_diffusers(toy, folder)), live) <= TOLERANCE
    export_components(model, tmp_path / "merged", merge=True)
    plain = UVit2DModel.from_pretrained(tmp_path / "merged", subfolder="transformer")
    assert plain.state_dict().keys() == base(toy).state_dict().keys()
    assert difference(logits(plain), live) <= 1e-5  # sums in a different order


def test_alpha_is_kept(toy: Path, tmp_path: Path) -> None:
    """r = 16, alpha = 32. The reference script saves no alpha, so its file loads at half strength."""
    lora = {**LORA, "r": 16, "lora_alpha": 32}
    model = trained(toy, adapters={"transformer": lora})
    export_components(model, tmp_path)
    folder, live = tmp_path / "transformer", logits(model.transformer)
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 32
    assert difference(logits(load_with_diffusers(toy, folder)), live) <= TOLERANCE
    assert difference(logits(PeftModel.from_pretrained(base(toy), folder)), live) <= TOLERANCE
    state = load_file(folder / WEIGHTS)
    assert all(name.startswith("transformer.") for name in state)
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    assert difference(logits(load_with_diffusers(toy, folder)), live) > 0.01


def test_export_detects_half_strength(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = adapters.write

    def without_alpha(module: nn.Module, folder: Path) -> None:
        write(module, folder)
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt"})

    monkeypatch.setattr(adapters, "write", without_alpha)
    with pytest.raises(UserError, match="loaded by diffusers, is not the model that was trained: its outputs differ"):
        export_components(trained(toy, adapters={"transformer": LORA}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_export_detects_a_changed_base(toy: Path, tmp_path: Path) -> None:
    """The check loads the base again, so an adapter that was trained on another base fails."""
    model = trained(toy, adapters={"transformer": LORA})
    with torch.no_grad():
        model.transformer.mlm_layer.conv2.weight.mul_(1.01)
    with pytest.raises(UserError, match="loaded by peft, is not the model that was trained"):
        export_components(model, tmp_path)
    with pytest.raises(UserError, match="the merged transformer is not the model that was trained"):
        export_components(model, tmp_path, merge=True)


def test_export_does_not_change_the_live_model(toy: Path, tmp_path: Path) -> None:
    model = trained(toy, adapters={"transformer": LORA}, train=["text_encoder"])
    kept = {name: (value, value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    parameters = [id(value) for value in model.parameters()]
    state = torch.random.get_rng_state()
    for index, dtype in enumerate((torch.float32, torch.float16)):
        export_components(model, tmp_path / f"a{index}", dtype=dtype)
        export_components(model, tmp_path / f"b{index}", merge=True, dtype=dtype)
        export_pipeline(model, tmp_path / f"c{index}", dtype=dtype)
    assert [id(value) for value in model.parameters()] == parameters
    for name, value in model.state_dict().items():
        assert value.data_ptr() == kept[name][1]
        assert torch.equal(value, kept[name][2])
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_text_encoder_adapter_and_full_transformer(toy: Path, tmp_path: Path) -> None:
    model = trained(toy, adapters={"text_encoder": TEXT}, train=["transformer"])
    export_components(model, tmp_path)
    encoder = CLIPTextModelWithProjection.from_pretrained(toy / "text_encoder")
    untrained = model.probe("text_encoder", encoder)
    live = model.probe("text_encoder", model.text_encoder)
    adapters.load_with_peft(encoder, tmp_path / "text_encoder")
    assert difference(model.probe("text_encoder", encoder), live) <= TOLERANCE
    assert difference(untrained, live) > 1e-4
    assert not (tmp_path / "text_encoder" / WEIGHTS).exists()  # diffusers has no loader for it
    plain = UVit2DModel.from_pretrained(tmp_path / "transformer")
    assert torch.equal(logits(plain), logits(model.transformer))


# ----------------------------------------------------------------------------------------- pipelines, dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pipeline_with_merged_weights(toy: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = trained(toy, adapters={"transformer": LORA}, train=["text_encoder"])
    exported = export_pipeline(model, tmp_path, dtype=dtype)
    half = dtype != torch.float32
    assert exported.relative <= (0.05 if half else 1e-5)
    assert (exported.relative > 1e-5) == half
    loaded = AmusedPipeline.from_pretrained(tmp_path)
    assert {module.dtype for module in (loaded.transformer, loaded.text_encoder, loaded.vqvae)} == {torch.float32}
    assert difference(logits(loaded.transformer), logits(model.transformer)) <= (0.05 if half else 1e-5)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    assert loaded("a cat", **options).images[0].size == (32, 32)
    dtypes = {
        name: {value.dtype for value in load_file(next((tmp_path / name).glob("*.safetensors"))).values()}
        for name in ("transformer", "text_encoder", "vqvae")
    }
    assert dtypes == {"transformer": {dtype}, "text_encoder": {dtype}, "vqvae": {torch.float32}}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_export_is_the_rounded_model(toy: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = trained(toy, adapters={"transformer": LORA}, train=["text_encoder"])
    transformer, encoder = export_components(model, tmp_path, dtype=dtype)
    state = load_file(tmp_path / "transformer" / "adapter_model.safetensors")
    assert {value.dtype for value in state.values()} == {dtype}
    assert 0 < transformer.relative < 0.02
    assert 0 < encoder.relative < 0.05
    loaded = logits(PeftModel.from_pretrained(base(toy), tmp_path / "transformer"))
    for parameter in model.transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype).float()
    live = logits(model.transformer)
    assert difference(loaded, live) <= TOLERANCE
    assert difference(logits(load_with_diffusers(toy, tmp_path / "transformer")), live) <= TOLERANCE


def test_merge_without_adapters_is_an_error(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--merge got a model without adapters"):
        export_components(AmusedModel(str(toy)), tmp_path, merge=True)


def test_file_modes_follow_the_umask(toy: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export_components(trained(toy, adapters={"transformer": LORA}, train=["text_encoder"]), tmp_path)
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 6  # with diffengine.json
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o640"}
    assert not list(tmp_path.rglob(".mode"))


# ----------------------------------------------------------------------------------------- convert, sample


def test_printed_lines_load_the_export(toy: Path, tmp_path: Path) -> None:
    import peft

    model = trained(toy, adapters={"transformer": LORA})
    (exported,) = export_components(model, tmp_path)
    assert len(exported.lines) == 2
    live = logits(model.transformer)
    first, second = exported.lines
    for line in (second, second.split("# or ")[1]):
        names: dict[str, Any] = {"UVit2DModel": UVit2DModel, "peft": peft}
        exec(f"{first}\n{line}", names)
        assert difference(logits(names["transformer"]), live) <= TOLERANCE


def test_convert_and_sample(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The adapter, the merged component and the pipeline generate the same image."""
    from diffengine.commands import convert

    model = trained(toy, adapters={"transformer": LORA})
    monkeypatch.chdir(tmp_path)
    export_components(model, Path("out"))
    export_components(model, Path("merged"), merge=True)
    export_pipeline(model, Path("pipeline"))
    images = []
    for source in (
        "out", "out/transformer", "pipeline", f"merged --base {toy}", f"out --base {toy}",
        f"merged/transformer --base {toy}",
    ):  # fmt: skip
        path, *flags = source.split()
        assert cli.main(["sample", path, "a cat", "--steps", "2", "--seed", "3", "--overwrite", *flags]) == 0
        images.append(Path("sample.png").read_bytes())
    assert all(image == images[0] for image in images)
    assert cli.main(["sample", str(toy), "a cat", "--steps", "2", "--seed", "3", "--overwrite"]) == 0
    assert Path("sample.png").read_bytes() != images[0]
    capsys.readouterr()
    assert cli.main(["sample", "pipeline", "a", "--base", str(toy)]) == 2
    assert "is a whole pipeline; leave it out" in capsys.readouterr().err
    assert cli.main(["sample", "merged", "a"]) == 2
    assert "name it with --base" in capsys.readouterr().err
    Path("empty").mkdir()
    assert cli.main(["sample", "empty", "a", "--base", str(toy)]) == 2
    assert "holds no adapter or component that convert wrote" in capsys.readouterr().err
    (Path("empty") / "config.json").write_text("[]")
    assert cli.main(["sample", "empty", "a", "--base", str(toy)]) == 2
    assert "'empty/config.json' holds a JSON list; expected an object" in capsys.readouterr().err
    settings = json.loads(Path("out/transformer/adapter_config.json").read_text())
    Path("out/transformer/adapter_config.json").write_text(json.dumps({**settings, "r": 5}))
    assert cli.main(["sample", "out", "a"]) == 2
    assert "does not fit transformer of the base" in capsys.readouterr().err
    assert convert.__doc__


def test_tolerances() -> None:
    assert (export.LOADED, export.MERGED) == (1e-5, 1e-3)


HOSTILE_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "import": ({"megatron_config": {"x": 1}, "megatron_core": "own"}, "names a module that would be imported"),
    "adapters elsewhere": ({"peft_type": "XLORA"}, "is of peft_type 'XLORA'; expected one such as LORA"),
    "no method": ({"peft_type": "os.system"}, "is of peft_type 'os.system'; expected one such as LORA"),
    "method is a list": ({"peft_type": []}, "is of peft_type []"),
    "full weights": ({"modules_to_save": ["embed"]}, "modules_to_save trains what is no adapter"),
    "bias": ({"bias": "all"}, "bias='all' would change the base model"),
    "huge rank": ({"r": 10**9}, "got the rank 1000000000; expected at most 8,192"),
    "huge rank of a layer": ({"rank_pattern": {"to_q": 10**9}}, "expected at most 8,192"),
    "rank is a text": ({"r": "x"}, "'x'"),
    "patterns are a list": ({"rank_pattern": [1]}, "rank_pattern"),
    "endless pattern": ({"target_modules": "(a+)+$"}, "has the pattern '(a+)+$', which may match for ever"),
    "slow pattern": ({"target_modules": ".*.*.*.*.*!"}, "which may match for ever"),
    "slow pattern of ranks": ({"rank_pattern": {"(.*)*!": 2}}, "which may match for ever"),
    "other targets": ({"target_modules": ["to_q"]}, "does not fit transformer of the base: "),
    "no targets": ({"target_modules": ["nope"]}, "does not fit transformer of the base: "),
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, which the tests copy."""
    out = tmp_path_factory.mktemp("adapter")
    export_components(trained(toy, adapters={"transformer": LORA}), out)
    return out / "transformer"


@pytest.mark.parametrize("case", HOSTILE_SETTINGS)
def test_settings_of_an_adapter_from_anywhere(
    toy: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    changed, message = HOSTILE_SETTINGS[case]
    (tmp_path / "own.py").write_text("open('executed', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    shutil.copytree(exported, "it")
    settings = json.loads(Path("it/adapter_config.json").read_text())
    Path("it/adapter_config.json").write_text(json.dumps({**settings, **changed}))
    with pytest.raises(UserError, match=re.escape(message)):
        adapters.put_on(base(toy), Path("it"), "transformer")
    assert not Path("executed").exists()


def test_the_config_of_a_checkpoint_is_judged_in_the_same_way(toy: Path) -> None:
    for changed, message in (
        (
            {"megatron_config": {"x": 1}, "megatron_core": "own"},
            "megatron_config names a module that would be imported",
        ),
        ({"target_modules": "(a+)+$"}, "which may match for ever"),
        ({"r": 10**9}, "got the rank 1000000000"),
    ):
        with pytest.raises(UserError, match=message):
            AmusedModel(str(toy), adapters={"transformer": {**LORA, **changed}})


@pytest.mark.parametrize("how", ["garbage", "header of 2**63", "other names", "pickled", "FIFO"])
def test_weights_of_an_adapter_from_anywhere(toy: Path, exported: Path, tmp_path: Path, how: str) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "it"))
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    file.unlink()
    if how == "other names":
        save_file({f"{name}x": value for name, value in state.items()}, file)
    elif how == "pickled":
        torch.save(state, folder / "adapter_model.bin")
    elif how == "FIFO":
        os.mkfifo(file)
    else:
        file.write_bytes(b"\xff" * 100 if how == "garbage" else (2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match=r"safetensors' cannot be read|does not fit transformer of the base: "):
        adapters.put_on(base(toy), folder, "transformer")
