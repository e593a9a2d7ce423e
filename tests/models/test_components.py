"""The checks that components fit each other, and components that are built from sizes."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UVit2DModel
from torch import nn

from diffengine.errors import UserError
from diffengine.models.amused import AmusedModel
from diffengine.models.amused.components import initialise
from diffengine.models.amused.vocabulary import from_assets, learn_vocabulary
from diffengine.models.pipelines import GUIDANCE, open_pipeline
from tests.support import models

WORDS = ["a red cat", "a blue dog", "yoda pokemon"]


@pytest.fixture
def folder(toy: Path, tmp_path: Path) -> Path:
    """Configs and tokenizer of the toy model, without weights: the checks must not need any."""
    ignore = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(toy, tmp_path / "model", ignore=ignore))


def change(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


VOCABULARY = len(models.small_vocabulary()[0])  # 534
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "text vocabulary": ("text_encoder/config.json", {"vocab_size": 600},
        f"tokenizer length is {VOCABULARY}, text_encoder.vocab_size is 600"),
    "end id": ("text_encoder/config.json", {"eos_token_id": 7},
        f"tokenizer's end token is {VOCABULARY - 1}, the id text_encoder takes for it is 7"),
    "CLIP's own end id": ("text_encoder/config.json", {"eos_token_id": 49407},
        f"tokenizer's end token is {VOCABULARY - 1}, the id text_encoder takes for it is 49407"),
    "codebook": ("vqvae/config.json", {"num_vq_embeddings": 32},
        "transformer.codebook_size is 64, vqvae.num_vq_embeddings is 32"),
    "mask id": ("scheduler/scheduler_config.json", {"mask_token_id": 64},
        "transformer.vocab_size - 1 is 79, scheduler.mask_token_id is 64"),
    "text width": ("text_encoder/config.json", {"hidden_size": 96},
        "transformer.encoder_hidden_size is 48, text_encoder.hidden_size is 96"),
    "projection": ("text_encoder/config.json", {"projection_dim": 48},
        "transformer.cond_embed_dim is 40, text_encoder.projection_dim is 48"),
    "micro-conditions": ("transformer/config.json", {"micro_cond_embed_dim": 64},
        "transformer.micro_cond_embed_dim is 64, 5 x micro_cond_encode_dim is 80"),
    "lookup": ("vqvae/config.json", {"lookup_from_codebook": False},
        "vqvae.lookup_from_codebook is False, what the pipeline needs is True"),
    "code width": ("vqvae/config.json", {"vq_embed_dim": 8},
        "vqvae.vq_embed_dim is 8, vqvae.latent_channels is 12"),
    "length": ("text_encoder/config.json", {"max_position_embeddings": 32},
        "tokenizer.model_max_length is 64, text_encoder has 32 positions"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_mismatch_is_reported(folder: Path, case: str) -> None:
    file, values, expected = CASES[case]
    change(folder, file, **values)
    with pytest.raises(UserError) as error:
        AmusedModel(str(folder))
    assert str(error.value) == f"model: {expected}"


def test_no_id_for_the_mask(folder: Path) -> None:
    change(folder, "transformer/config.json", vocab_size=64)
    change(folder, "scheduler/scheduler_config.json", mask_token_id=63)
    with pytest.raises(UserError, match=r"vocab_size leaves no id for the mask above codebook_size$"):
        AmusedModel(str(folder))


def test_one_error_lists_all_problems(folder: Path) -> None:
    change(folder, "text_encoder/config.json", vocab_size=600, projection_dim=48)
    change(folder, "vqvae/config.json", lookup_from_codebook=False)
    with pytest.raises(UserError) as error:
        AmusedModel(str(folder), train=["vqvae"], label_smoothing=2.0)
    for expected in (
        "train got",
        "label_smoothing",
        "tokenizer length",
        "cond_embed_dim",
        "lookup_from_codebook",
    ):
        assert expected in str(error.value)


def test_end_id_2_is_the_highest_id(folder: Path, tmp_path: Path) -> None:
    """The released models have 2, toy the tokenizer's own id. Both pass the checks, so only weights are missing."""
    for eos in (2, VOCABULARY - 1):
        change(folder, "text_encoder/config.json", eos_token_id=eos)
        with pytest.raises(UserError, match="holds no weights in safetensors"):
            AmusedModel(str(folder))


def test_empty_tokenizer_folder(folder: Path) -> None:
    """transformers 5 returns a tokenizer of two entries, without an error."""
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    with pytest.raises(UserError, match=r"no tokenizer files in '.*': got a vocabulary of 2; expected vocab.json"):
        AmusedModel(str(folder))


def test_wrong_model_folders(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "vqvae")
    with pytest.raises(UserError, match=r"holds no folder 'vqvae'; it has model_index.json, scheduler"):
        AmusedModel(str(folder))
    AutoencoderKL(norm_num_groups=4, block_out_channels=(8,)).save_config(folder / "vqvae")
    with pytest.raises(UserError, match="is a AutoencoderKL; expected a VQModel"):
        AmusedModel(str(folder))
    with pytest.raises(UserError, match=r"model folder '.*gone' does not exist"):
        AmusedModel(str(tmp_path / "gone"))


def test_missing_weights_are_an_error(toy: Path, tmp_path: Path) -> None:
    """diffusers initialises them at random, with a warning."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(toy, tmp_path / "model"))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["embed.conv.weight"]
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of a UVit2DModel, first embed.conv.weight"):
        AmusedModel(str(folder))


def test_a_panic_in_rust_is_an_error(toy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy, tmp_path / "model"))
    file = folder / "tokenizer" / "tokenizer.json"
    broken = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": broken}))
    with pytest.raises(UserError, match=r"cannot load tokenizer of .*: Precompiled"):
        AmusedModel(str(folder))


def test_broken_weights_are_an_error(toy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy, tmp_path / "model"))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load transformer of"):
        AmusedModel(str(folder))


TRANSFORMER_FILE, VQ_FILE, TEXT_FILE = (f"{name}/config.json" for name in ("transformer", "vqvae", "text_encoder"))
SCHEDULER_FILE, TOKENIZER_FILE = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
WRONG_VALUES: dict[str, tuple[str, dict[str, Any], str]] = {
    "width is a text": (TRANSFORMER_FILE, {"hidden_size": "x"}, r"transformer.hidden_size got 'x' \(str\)"),
    "width is zero": (TRANSFORMER_FILE, {"hidden_size": 0}, "cannot load transformer"),
    "vocabulary is a list": (TRANSFORMER_FILE, {"vocab_size": [1]}, "transformer.vocab_size got"),
    "negative layers": (TRANSFORMER_FILE, {"num_hidden_layers": -1}, "weights that its config.json has not"),
    "too many layers": (TRANSFORMER_FILE, {"num_hidden_layers": 10**7}, "has num_hidden_layers=10000000 in its config"),
    "too wide": (TRANSFORMER_FILE, {"intermediate_size": 10**9}, "config.json of .* parameters, and"),
    "far too wide": (TRANSFORMER_FILE, {"hidden_size": 10**15}, "cannot load transformer"),
    "no heads": (TRANSFORMER_FILE, {"num_attention_heads": 0}, "cannot load transformer"),
    "no upsampling": (TRANSFORMER_FILE, {"upsample": False}, "weights that its config.json has not"),
    "huge images": (TRANSFORMER_FILE, {"sample_size": 10**9}, "sample_size is 1000000000; expected 1 to 4096"),
    "no levels": (VQ_FILE, {"block_out_channels": []}, "levels of vqvae.block_out_channels is 0"),
    "levels are a number": (VQ_FILE, {"block_out_channels": 5}, "vqvae.block_out_channels got 5"),
    "many levels": (VQ_FILE, {"down_block_types": ["DownEncoderBlock2D"] * 999}, "down_block_types=999 in its config"),
    "code of a folder": (TEXT_FILE, {"auto_map": {"AutoConfig": "code.A"}, "model_type": "x"}, "executed"),
    "text layers": (TEXT_FILE, {"num_hidden_layers": 10**7}, "has num_hidden_layers=10000000 in its config"),
    "positions": (TEXT_FILE, {"max_position_embeddings": 10**9}, "config.json of .* parameters, and"),
    "outputs without names": (TEXT_FILE, {"return_dict": False}, "text_encoder.return_dict is False, what we read"),
    "quantized": (TEXT_FILE, {"quantization_config": {"load_in_8bit": True}}, "text_encoder is quantized"),
    "text width is a text": (TEXT_FILE, {"hidden_size": "x"}, "cannot load text_encoder"),
    "schedule": (SCHEDULER_FILE, {"masking_schedule": "x"}, "scheduler.masking_schedule is 'x'; expected cosine or"),
    "mask is a text": (SCHEDULER_FILE, {"mask_token_id": "x"}, "scheduler.mask_token_id is x"),
    "endless captions": (TOKENIZER_FILE, {"model_max_length": 10**9}, "model_max_length is 1000000000; expected"),
    "captions of no length": (TOKENIZER_FILE, {"model_max_length": 0}, "tokenizer.model_max_length is 0; expected"),
    "length is a list": (TOKENIZER_FILE, {"model_max_length": [1]}, r"model_max_length is \[1\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_wrong_values_in_a_model_folder(toy: Path, tmp_path: Path, case: str) -> None:
    """No hang, no memory, no code; one line."""
    file, values, message = WRONG_VALUES[case]
    folder = Path(shutil.copytree(toy, tmp_path / "model"))
    change(folder, file, **values)
    (folder / "text_encoder" / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass A: pass")
    if message == "executed":
        open_pipeline(str(folder))
    else:
        with pytest.raises(UserError, match=message) as caught:
            open_pipeline(str(folder))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def pickled(file: Path) -> None:
    file.unlink()
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        torch.save({"x": torch.zeros(1)}, file.with_name(name))


def with_header(size: int, text: bytes = b"{}") -> Callable[[Path], object]:
    return lambda file: file.write_bytes(size.to_bytes(8, "little") + text + bytes(64))


WEIGHTS: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""), "header of 2**63": with_header(2**63), "no header": with_header(2),
    "no JSON": with_header(1, b"["), "pickled": pickled, "missing": Path.unlink,
    "folder": lambda file: (file.unlink(), file.mkdir()), "FIFO": lambda file: (file.unlink(), os.mkfifo(file)),
    "device": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
    "link to itself": lambda file: (file.unlink(), file.symlink_to(file.name)),
}  # fmt: skip


@pytest.mark.parametrize("file", [f"{TRANSFORMER_FILE[:11]}/diffusion_pytorch_model", "text_encoder/model"])
@pytest.mark.parametrize("how", WEIGHTS)
def test_damaged_weights_in_a_model_folder(toy: Path, tmp_path: Path, file: str, how: str) -> None:
    folder = Path(shutil.copytree(toy, tmp_path / "model"))
    WEIGHTS[how](folder / f"{file}.safetensors")
    with pytest.raises(UserError) as caught:
        open_pipeline(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["model_index.json", TRANSFORMER_FILE, TEXT_FILE, SCHEDULER_FILE, TOKENIZER_FILE,
                                  "tokenizer/tokenizer.json"])  # fmt: skip
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", None])
def test_json_in_a_model_folder(folder: Path, file: str, content: bytes | None) -> None:
    (folder / file).unlink()
    if content is None:
        os.mkfifo(folder / file)
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file}' (is not JSON|holds a JSON list|cannot be read: it is no regular)"):
        open_pipeline(str(folder))


WRONG_INDEX: list[dict[str, Any]] = [
    {"_class_name": "os.system"}, {"_class_name": ["os", "system"]}, {"_class_name": None}, {GUIDANCE: "x"},
    {GUIDANCE: -1}, {GUIDANCE: float("nan")},
]  # fmt: skip


@pytest.mark.parametrize("values", WRONG_INDEX, ids=str)
def test_index_of_a_model_folder(folder: Path, values: dict[str, Any]) -> None:
    change(folder, "model_index.json", **values)
    with pytest.raises(UserError, match=r"is a pipeline of|has a guidance scale of"):
        open_pipeline(str(folder))


def test_shards_are_in_the_folder(folder: Path) -> None:
    index = {"weight_map": {"x": "../../secret.safetensors"}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="names weights that are not in its folder"):
        open_pipeline(str(folder))


def test_ids_without_an_embedding(folder: Path) -> None:
    """They would reach the embedding's kernel."""
    file = folder / "tokenizer" / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["model"]["vocab"]["cat</w>"] = 10**6
    del settings["model"]["vocab"]["mon</w>"]
    settings["model"]["merges"] = settings["model"]["merges"][:5]
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"tokenizer has the id 1000000, text_encoder.vocab_size is 534|end token is"):
        open_pipeline(str(folder))


@pytest.mark.parametrize("assets", [{"../x.json": ""}, {"..": ""}, {"": ""}, {"a\0.json": ""}, {"tokenizer.json": "["},
                                    {"tokenizer.json": "\ud800"}], ids=str)  # fmt: skip
def test_assets_of_a_checkpoint(assets: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"expected files of a tokenizer|tokenizer.json' is not JSON"):
        from_assets({"tokenizer_config.json": "{}", **assets})


# ---------------------------------------------------------------------------------------------- from sizes

TEXT = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
TRANSFORMER = {
    "hidden_size": 32, "micro_cond_encode_dim": 8, "in_channels": 24, "block_out_channels": 24,
    "num_res_blocks": 1,
    "block_num_heads": 2, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "downsample": True, "upsample": True, "sample_size": 8,
}  # fmt: skip
Build = Callable[..., AmusedModel]


@pytest.fixture(scope="module")
def build(toy: Path) -> Build:
    """Builds a model from the toy VQ model, and from sizes for the rest."""
    assets = learn_vocabulary(WORDS, 560, 16)

    def built(**options: Any) -> AmusedModel:
        given: dict[str, Any] = {
            "vqvae": str(toy), "tokenizer": {"vocab_size": 560, "max_length": 16}, "text_encoder": TEXT,
            "transformer": TRANSFORMER, "train": ["transformer", "text_encoder"], "assets": assets,
        }  # fmt: skip
        return AmusedModel(**{**given, **options})

    return built


def test_missing_sizes_are_derived(build: Build) -> None:
    model = build()
    text, transformer = model.text_encoder.config, model.transformer.config
    tokenizer = model.components.tokenizer
    assert text.vocab_size == len(tokenizer)
    assert text.max_position_embeddings == 16
    assert text.eos_token_id == text.pad_token_id == tokenizer.eos_token_id == len(tokenizer) - 1
    assert text.projection_dim == 24
    assert transformer.codebook_size == 64
    assert transformer.vocab_size == 72  # 64 codes and the mask, rounded up to 8
    assert (transformer.encoder_hidden_size, transformer.cond_embed_dim) == (24, 24)
    assert transformer.micro_cond_embed_dim == 40
    assert model.mask_id == 71
    assert model.sample_transform.grid.sides(32, 32) == (8, 8)


def test_given_size_is_kept(build: Build) -> None:
    assert build(transformer={**TRANSFORMER, "vocab_size": 80}).mask_id == 79


def test_seed_determines_the_model_and_global_rng_is_kept(build: Build) -> None:
    before = torch.random.get_rng_state()
    first, same, other = build(seed=3), build(seed=3), build(seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]), name
    assert not torch.equal(
        first.state_dict()["transformer.project_to_hidden.weight"],
        other.state_dict()["transformer.project_to_hidden.weight"],
    )


def test_frozen_component_from_sizes_is_an_error(build: Build) -> None:
    with pytest.raises(UserError, match=r"text_encoder is built from sizes and not trained.*or name it in `train`$"):
        build(train=["transformer"])
    with pytest.raises(UserError, match=r"vqvae is built from sizes and not trained.*give a folder for it$"):
        build(vqvae=models.vq_config("toy"))


def test_unknown_size_is_an_error(build: Build) -> None:
    """diffusers and transformers ignore unknown sizes."""
    with pytest.raises(UserError) as error:
        build(text_encoder={**TEXT, "hiden_size": 3}, transformer={**TRANSFORMER, "depth": 3})
    assert str(error.value) == (
        "model: text_encoder has no size 'hiden_size'; did you mean 'hidden_size'?; transformer has no size 'depth'"
    )


def test_model_without_arguments_is_an_error() -> None:
    with pytest.raises(UserError, match="neither `pretrained` nor `vqvae`, `tokenizer`"):
        AmusedModel()


def test_distinct_captions_have_distinct_embeddings(build: Build) -> None:
    """With CLIP's default end id in a small vocabulary, all captions would have the same embedding."""
    model = build()
    _, pooled = model.encode_text(model.preprocessor.text_ids([*WORDS, "", "a red dog"]))
    distances = torch.cdist(pooled, pooled) + torch.eye(5)
    assert distances.min() > 1e-3


def test_initialisation_matches_open_muse() -> None:
    sizes = {**models.transformer_config("toy"), "hidden_size": 256, "codebook_size": 500, "vocab_size": 512}
    torch.manual_seed(0)
    model = UVit2DModel(**{**sizes, "use_bias": True})
    initialise(model)
    embedding = model.embed.embeddings.weight
    assert float(embedding.detach().std()) == pytest.approx(math.sqrt(1 / 512), rel=0.02)
    assert torch.equal(model.mlm_layer.conv2.weight[:, :, 0, 0], embedding[:500])
    assert not model.mlm_layer.conv1.weight.any()
    zero = ("cond_embeds_mapper", "norm1.linear", "norm2.linear", "norm3.linear")
    zeroed, random = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and "mlm_layer" not in name:
            (zeroed if name.endswith(zero) else random).append((name, module))
            assert module.bias is None or not module.bias.any()
    assert len(zeroed) == 3 * 2 + 2  # three norms in each of two layers, one mapper in each of two blocks
    assert not any(module.weight.any() for _, module in zeroed)
    values = torch.cat([module.weight.detach().flatten() for _, module in random])
    assert float(values.mean()) == pytest.approx(0, abs=1e-4)
    assert float(values.std()) == pytest.approx(0.02, rel=0.02)
    for name, module in random:
        assert 0.016 < float(module.weight.detach().std()) < 0.024, name


def test_first_loss_is_chance(build: Build) -> None:
    """The head is zero at first, so the first loss is exactly ln(codes)."""
    model = build()
    batch = {
        "image": torch.rand(1, 3, 32, 32), "text": ["a red cat"], "micro_conds": torch.rand(1, 5),
        "masked": [torch.arange(10).numpy()],
    }  # fmt: skip
    loss, _ = model(model.prepare(batch))
    assert float(loss.detach()) == pytest.approx(10 * math.log(64), rel=1e-6)
