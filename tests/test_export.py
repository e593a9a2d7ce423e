"""An export holds exactly the trained weights, and never overwrites other files."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AmusedImg2ImgPipeline, AmusedInpaintPipeline, AmusedPipeline, UVit2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from diffengine import __version__, cli, export
from diffengine.engine.checkpoint import FORMAT, write
from diffengine.engine.state import model_of, trusted_config
from diffengine.errors import UserError
from diffengine.export import export_components, export_pipeline
from diffengine.models.amused import AmusedModel
from diffengine.models.amused.vocabulary import learn_vocabulary
from diffengine.models.vq import VQTokenizerModel
from tests.support import models

OPTIONS: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_model_folder(tmp_path_factory.mktemp("model") / "toy", "toy")


def changed(folder: Path, **options: Any) -> AmusedModel:
    """A model whose weights differ from those in the folder."""
    model = AmusedModel(str(folder), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    return model


def equal(loaded: torch.nn.Module, live: torch.nn.Module) -> bool:
    left, right = loaded.state_dict(), live.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---------------------------------------------------------------------------------------------- components


def test_components_are_exported_bit_for_bit(toy: Path, tmp_path: Path) -> None:
    model = changed(toy, train=["transformer", "text_encoder"])
    folders = [item.folder for item in export_components(model, tmp_path)]
    assert folders == [tmp_path / "transformer", tmp_path / "text_encoder"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["diffengine.json", "text_encoder", "transformer"]
    assert equal(UVit2DModel.from_pretrained(tmp_path, subfolder="transformer"), model.transformer)
    assert equal(CLIPTextModelWithProjection.from_pretrained(folders[1]), model.text_encoder)
    assert [file.suffix for file in sorted(folders[0].iterdir())] == [".json", ".safetensors"]


def test_save_keys_choose_the_components(toy: Path, tmp_path: Path) -> None:
    model = changed(toy, train=["transformer", "text_encoder"])
    (exported,) = export_components(model, tmp_path, ["text_encoder"])
    assert exported.folder == tmp_path / "text_encoder"
    assert exported.difference == exported.relative == 0
    assert {file.name for file in tmp_path.iterdir()} == {"diffengine.json", "text_encoder"}
    with pytest.raises(UserError, match="--save-keys got 'vqvae'; this model trains transformer, text_encoder"):
        export_components(model, tmp_path / "other", ["vqvae"])
    assert not (tmp_path / "other").exists()


def test_export_does_not_read_frozen_weights(toy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy, tmp_path / "model"))
    for name in ("vqvae", "text_encoder"):
        for file in (folder / name).glob("*.safetensors"):
            file.unlink()
    export_components(AmusedModel(str(folder)), tmp_path / "out")


def test_older_export_is_replaced(toy: Path, tmp_path: Path) -> None:
    export_components(AmusedModel(str(toy)), tmp_path)
    (tmp_path / "transformer" / "stale.txt").write_text("old")
    model = changed(toy)
    export_components(model, tmp_path)
    assert not (tmp_path / "transformer" / "stale.txt").exists()
    assert equal(UVit2DModel.from_pretrained(tmp_path / "transformer"), model.transformer)


def test_failed_export_keeps_the_older_one(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = AmusedModel(str(toy))
    export_components(first, tmp_path)

    def fail_halfway(self: Any, folder: Path, **options: Any) -> None:
        Path(folder).mkdir()
        (Path(folder) / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(UVit2DModel, "save_pretrained", fail_halfway)
    with pytest.raises(UserError, match=r"cannot write to '.*': .*No space left on device"):
        export_components(changed(toy), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"diffengine.json", "transformer"}
    assert equal(UVit2DModel.from_pretrained(tmp_path / "transformer"), first.transformer)


def test_weights_that_load_back_differently_are_an_error(toy: Path, tmp_path: Path) -> None:
    model = changed(toy)
    folder = export_components(model, tmp_path)[0].folder
    weights = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    bits = state["embed.conv.weight"].view(torch.int32)
    bits.view(-1)[0] ^= 1  # flip the last bit of one value
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"does not load back what was written: 1 entries differ, first embed\.conv"):
        export._check_whole(model, "transformer", model.transformer, folder, torch.float32)


def test_nan_weights_are_exported(toy: Path, tmp_path: Path) -> None:
    model = changed(toy)
    with torch.no_grad():
        model.transformer.embed.conv.weight.view(-1)[0] = float("nan")
    export_components(model, tmp_path)


def test_base_model_is_never_overwritten(toy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy, tmp_path / "base"))
    before = (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    model = changed(folder)
    message = r"is the transformer that this model was made from, and would be lost; write to another folder"
    with pytest.raises(UserError, match=message):
        export_components(model, folder)
    with pytest.raises(UserError, match=message):
        export_components(model, tmp_path / "base" / "vqvae" / "..")
    with pytest.raises(UserError, match="that this model was made from"):
        export_pipeline(model, folder)
    own = AmusedModel(str(toy), transformer=str(folder / "transformer"))
    with pytest.raises(UserError, match=message):
        export_components(own, folder)
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    with pytest.raises(UserError, match="is the vqvae that this model was made from"):
        export_components(VQTokenizerModel(str(folder)), folder)


def test_folder_with_other_files_is_not_replaced(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="transformer' exists and was not written by diffengine; move it away"):
        export_components(AmusedModel(str(toy)), tmp_path)
    assert (tmp_path / "transformer" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("name", ["transformer", ".export.tmp"])
def test_what_looks_like_an_export_but_is_not_ours_is_kept(toy: Path, tmp_path: Path, name: str) -> None:
    """A model of the user's, or the folder of another program that uses our temporary name."""
    folder = Path(shutil.copytree(toy / "transformer", tmp_path / name))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match=rf"{name}' exists and was not written by diffengine; move it away, or write"):
        export_components(AmusedModel(str(toy)), tmp_path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_export_replaces_a_link_and_not_what_it_points_to(toy: Path, tmp_path: Path) -> None:
    out, linked = tmp_path / "out", tmp_path / "linked"
    model = changed(toy)
    export_components(model, out)
    (out / "transformer").rename(linked)
    (out / "transformer").symlink_to(linked)
    (out / ".notes.tmp").write_text("mine")
    (linked / "notes.txt").write_text("mine")
    export_components(model, out)
    assert not (out / "transformer").is_symlink()
    assert sorted(file.name for file in out.iterdir()) == [".notes.tmp", "diffengine.json", "transformer"]
    assert (linked / "notes.txt").read_text() == "mine"


def test_pipeline_of_an_older_version_is_replaced(toy: Path, tmp_path: Path) -> None:
    out = export_pipeline(changed(toy), tmp_path / "out").folder
    (out / "diffengine.json").unlink()
    export_pipeline(changed(toy), out)
    assert (out / "diffengine.json").exists()


# ---------------------------------------------------------------------------------------------- pipeline


def test_pipeline_export(toy: Path, tmp_path: Path) -> None:
    model = changed(toy)
    out = export_pipeline(model, tmp_path / "pipeline").folder
    assert sorted(file.name for file in out.iterdir()) == [
        "diffengine.json", "model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vqvae"
    ]  # fmt: skip
    live, loaded = model.build_pipeline(), AmusedPipeline.from_pretrained(out)
    images = [
        pipeline("yoda pokemon", generator=torch.Generator().manual_seed(1), **OPTIONS).images[0]
        for pipeline in (live, loaded)
    ]
    assert images[0].tobytes() == images[1].tobytes()
    image, mask = images[0], Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    edited = AmusedImg2ImgPipeline.from_pretrained(out)("a cat", image, **OPTIONS).images[0]
    filled = AmusedInpaintPipeline.from_pretrained(out)("a cat", image, mask, **OPTIONS).images[0]
    assert edited.size == filled.size == (32, 32)
    export_pipeline(model, out)  # a second export replaces the first
    assert equal(UVit2DModel.from_pretrained(out / "transformer"), model.transformer)


def test_foreign_pipeline_is_not_replaced(toy: Path, tmp_path: Path) -> None:
    model = changed(toy)
    folder = export_pipeline(model, tmp_path / "ours").folder
    assert json.loads((folder / "model_index.json").read_text())["_diffengine_version"] == __version__
    AmusedPipeline.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    for other in (tmp_path / "theirs", Path(shutil.copytree(toy, tmp_path / "downloaded"))):
        before = {file: file.read_bytes() for file in other.rglob("*") if file.is_file()}
        with pytest.raises(UserError, match="exists and was not written by diffengine; move it away"):
            export_pipeline(model, other)
        assert {file: file.read_bytes() for file in other.rglob("*") if file.is_file()} == before


def test_pipeline_trained_from_scratch_keeps_its_vocabulary(toy: Path, tmp_path: Path) -> None:
    assets = learn_vocabulary(["a red cat", "a blue dog"], 540, 12)
    text = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    transformer = {
        "hidden_size": 32, "micro_cond_encode_dim": 8, "in_channels": 24, "block_out_channels": 24,
        "num_res_blocks": 1, "block_num_heads": 2, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 64, "sample_size": 8,
    }  # fmt: skip
    model = AmusedModel(
        vqvae=str(toy), tokenizer={"vocab_size": 540, "max_length": 12}, text_encoder=text,
        transformer=transformer, train=["transformer", "text_encoder"], assets=assets,
    )  # fmt: skip
    loaded = AmusedPipeline.from_pretrained(export_pipeline(model, tmp_path / "out").folder)
    assert loaded.tokenizer.get_vocab() == model.components.tokenizer.get_vocab()
    assert loaded.tokenizer.model_max_length == 12
    assert loaded.scheduler.config.mask_token_id == model.mask_id
    images = [
        pipeline("a blue cat", generator=torch.Generator().manual_seed(1), **OPTIONS).images[0].tobytes()
        for pipeline in (model.build_pipeline(), loaded)
    ]
    assert images[0] == images[1]


def test_model_without_pipeline(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="VQTokenizerModel has no pipeline; leave --pipeline out to export vqvae"):
        export_pipeline(VQTokenizerModel(str(toy)), tmp_path)


# ---------------------------------------------------------------------------------------------- checkpoints


def checkpoint(toy: Path, class_name: str = "diffengine.models.amused.AmusedModel", **options: Any) -> dict[str, Any]:
    config = {"model": {"type": class_name, "pretrained": str(toy), **options}, "seed": 0}
    return {"config": json.dumps(config), "name": "own", "assets": {}, "model": changed(toy).trained_state()}


def test_model_is_rebuilt_from_a_checkpoint(toy: Path) -> None:
    state = checkpoint(toy)
    model = model_of(state, trusted_config(state, None, "checkpoint 'x'"), "checkpoint 'x'")
    assert isinstance(model, AmusedModel)
    assert equal(model.transformer, changed(toy).transformer)
    assert not model.training


@pytest.mark.parametrize("class_name", ["os.system", "builtins.exec", "subprocess.run"])
def test_checkpoint_cannot_run_code(toy: Path, class_name: str) -> None:
    with pytest.raises(UserError, match=f"names the class '{class_name}', which is not run on a checkpoint's word"):
        trusted_config(checkpoint(toy, class_name), None, "checkpoint 'x'")
    nested = checkpoint(toy, vqvae={"type": class_name})
    with pytest.raises(UserError, match=f"names the class '{class_name}'"):
        trusted_config(nested, None, "checkpoint 'x'")


def test_checkpoint_cannot_use_other_classes_of_a_trusted_package(toy: Path) -> None:
    """diffusers.DiffusionPipeline.from_pretrained can run remote code."""
    with pytest.raises(UserError, match=r"names the class 'diffusers\.DiffusionPipeline'"):
        trusted_config(checkpoint(toy, "diffusers.DiffusionPipeline"), None, "checkpoint 'x'")
    inner = checkpoint(toy, adapters={"transformer": {"type": "peft.import_utils.importlib"}})
    with pytest.raises(UserError, match=r"names the class 'peft\.import_utils\.importlib'"):
        trusted_config(inner, None, "checkpoint 'x'")


@pytest.mark.parametrize(
    ("settings", "adapter"),
    [
        ({"x": {"type": "evil.Cfg", "r": "${rank}"}, "rank": 4}, "${x}"),
        ({"y": "evil.Cfg"}, {"type": "${y}", "r": 4}),
        ({"y": "ev"}, {"type": "${y}il.Cfg", "r": 4}),
    ],
)
@pytest.mark.parametrize("command", ["sample", "convert"])
def test_class_behind_a_reference_is_not_imported(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    settings: dict, adapter: Any, command: str,
) -> None:  # fmt: skip
    """References are resolved before classes are checked. `evil` is importable: it lies in the current folder."""
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    state = checkpoint(toy)
    config = json.loads(state["config"])
    config["model"] |= {"train": [], "adapters": {"transformer": adapter}}
    state |= {
        "config": json.dumps({**config, **settings}),
        "format": FORMAT,
        "counters": {"iter": 1, "epoch": 0},
        "num_samples": 1,
    }
    state |= {"optimizer": {}, "param_scheduler": {}, "scaler": {}}
    write(tmp_path / "run" / "iter_1.pth", state)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    argv = ["sample", "run/iter_1.pth", "a cat"] if command == "sample" else ["convert", "run"]
    assert cli.main(argv) == 2
    assert "names the class 'evil.Cfg', which is not run on a checkpoint's word" in capsys.readouterr().err
    assert "evil" not in sys.modules


def test_checkpoint_commands_do_not_import_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    for command in ("sample absent.pth prompt", "convert absent", "convert absent.pth out"):
        monkeypatch.setattr(sys, "argv", ["diffengine", *command.split()])
        with pytest.raises(SystemExit):
            cli.console()
        assert "" not in sys.path


def test_checkpoint_of_another_model(toy: Path) -> None:
    given = {"model": {"type": "diffengine.models.vq.VQTokenizerModel"}}
    with pytest.raises(UserError, match=r"is of another model: got .*AmusedModel, the config has .*VQ.*\('own'\)"):
        trusted_config(checkpoint(toy), given, "checkpoint 'x'")


def test_class_named_by_the_users_config_is_trusted(toy: Path) -> None:
    given = {"model": {"type": "own.Model"}}
    assert trusted_config(checkpoint(toy, "own.Model"), given, "x")["model"]["type"] == "own.Model"
