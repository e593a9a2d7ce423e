"""Complete AmusedPipeline folders with random weights, in the layout of the released models.

Sizes:
- "tiny": the topology of the released models (five VQ levels, f = 16) at tiny widths, for 512 or 256 px.
- "toy": f = 4 for 32 px images: small enough to learn something within a test.
- "full": the exact configs of amused-256 and amused-512. 3.5 GB on disk.

In tiny and toy the widths differ from each other wherever the classes allow it, so that code which confuses two
widths fails. In the released models six of them are 768.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel, VQModel
from PIL.Image import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

Size = Literal["tiny", "toy", "full"]

BOS, EOS = "<|startoftext|>", "<|endoftext|>"

# Merges of the small vocabulary, highest rank first. A few are enough: merges.txt is not empty, and captions of usual
# length stay below the maximum. They are fixed, because training a BPE gives a different vocabulary each run.
SMALL_MERGES = (
    "t h", "th e</w>", "i n", "in g</w>", "o n</w>", "o f</w>", "a n", "an d</w>", "e r", "r e",
    "p h", "ph o", "o t", "pho t", "phot o</w>", "p o", "k e", "po ke", "m on</w>", "poke mon</w>",
)  # fmt: skip

# Parameter counts of the released models by resolution.
FULL_PARAMETERS: dict[int, dict[str, int]] = {
    256: {"transformer": 603_537_664, "vqvae": 146_244_675, "text_encoder": 123_650_304},
    512: {"transformer": 608_257_792, "vqvae": 146_244_675, "text_encoder": 123_650_304},
}

_VQ: dict[Size, dict[str, Any]] = {
    "tiny": {
        "block_out_channels": [8, 8, 16, 16, 24],
        "latent_channels": 12,
        "layers_per_block": 1,  # 2 doubles the encoding time, which is most of a 512 px step
        "norm_num_groups": 8,
        "num_vq_embeddings": 64,
    },
    "toy": {
        "block_out_channels": [16, 32, 32],
        "latent_channels": 12,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "num_vq_embeddings": 64,
    },
    "full": {
        "block_out_channels": [128, 256, 256, 512, 768],
        "latent_channels": 64,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "num_vq_embeddings": 8192,
    },
}

_TRANSFORMER: dict[Size, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 32,
        "cond_embed_dim": 20,
        "micro_cond_encode_dim": 8,
        "micro_cond_embed_dim": 40,
        "encoder_hidden_size": 24,
        "vocab_size": 80,
        "codebook_size": 64,
        "in_channels": 28,
        "block_out_channels": 36,
        "num_res_blocks": 2,
        "block_num_heads": 3,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 88,
    },
    "toy": {
        "hidden_size": 64,
        "cond_embed_dim": 40,
        "micro_cond_encode_dim": 16,
        "micro_cond_embed_dim": 80,
        "encoder_hidden_size": 48,
        "vocab_size": 80,
        "codebook_size": 64,
        "in_channels": 56,
        "block_out_channels": 60,
        "num_res_blocks": 1,
        "block_num_heads": 3,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 176,
    },
    "full": {
        "hidden_size": 1024,
        "cond_embed_dim": 768,
        "micro_cond_encode_dim": 256,
        "micro_cond_embed_dim": 1280,
        "encoder_hidden_size": 768,
        "vocab_size": 8256,
        "codebook_size": 8192,
        "in_channels": 768,
        "block_out_channels": 768,
        "num_res_blocks": 3,
        "block_num_heads": 12,
        "num_hidden_layers": 22,
        "num_attention_heads": 16,
        "intermediate_size": 2816,
    },
}

_TEXT: dict[Size, dict[str, Any]] = {
    "tiny": {"hidden_size": 24, "intermediate_size": 52, "num_attention_heads": 4, "num_hidden_layers": 2},
    "toy": {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2},
    "full": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
    },
}

# toy is shorter than CLIP's 77, so that a hard-coded 77 fails.
_TEXT_LENGTH: dict[Size, int] = {"tiny": 77, "toy": 64, "full": 77}


def default_resolution(size: Size) -> int:
    """The resolution in pixels if none is given."""
    return 32 if size == "toy" else 512


def vq_config(size: Size) -> dict[str, Any]:
    """Arguments of VQModel. f = 2 ** (len(block_out_channels) - 1) is 16 (tiny, full) or 4 (toy)."""
    levels = len(_VQ[size]["block_out_channels"])
    return {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": 3,
        "out_channels": 3,
        "lookup_from_codebook": True,
        "mid_block_add_attention": False,
        "sample_size": 32,
        "scaling_factor": 0.18215,
        "vq_embed_dim": None,
        "force_upcast": True,
        **_VQ[size],
    }


def transformer_config(size: Size, resolution: int | None = None) -> dict[str, Any]:
    """Arguments of UVit2DModel. sample_size is in tokens: resolution / f.

    As in the released models, 512 px resamples and 256 px does not. toy resamples too, for speed.
    """
    resolution = resolution or default_resolution(size)
    factor = 4 if size == "toy" else 16
    known = (32, 64) if size == "toy" else (256, 512)
    if resolution not in known:
        raise ValueError(f"got resolution {resolution} for a {size} model; expected one of {known}")
    resample = resolution != 256
    return {
        "use_bias": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "layer_norm_eps": 1e-6,
        "ln_elementwise_affine": True,
        "downsample": resample,
        "upsample": resample,
        "sample_size": resolution // factor,
        **_TRANSFORMER[size],
    }


def text_config(size: Size) -> dict[str, Any]:
    """Arguments of CLIPTextConfig.

    The released models have eos_token_id 2: CLIP then pools at the highest id in the row, so `<|endoftext|>` must have
    the highest id. toy has the tokenizer's own id instead. Both conventions are in use.
    """
    vocabulary = 49_408 if size == "full" else len(small_vocabulary()[0])
    return {
        "hidden_act": "quick_gelu",
        "vocab_size": vocabulary,
        "max_position_embeddings": _TEXT_LENGTH[size],
        "projection_dim": _TRANSFORMER[size]["cond_embed_dim"],
        "bos_token_id": 0,
        "eos_token_id": vocabulary - 1 if size == "toy" else 2,
        "pad_token_id": 1,
        **_TEXT[size],
    }


def _byte_alphabet() -> list[str]:
    """The 256 printable characters that represent bytes in a byte-level BPE, in the order of CLIP's ids."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(256 + k) for k in range(256 - len(printable))]


def _vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Token -> id in CLIP's order: bytes, word-final bytes, merges, start, end. The end token has the highest id."""
    alphabet = _byte_alphabet()
    tokens = alphabet + [f"{letter}</w>" for letter in alphabet] + ["".join(pair) for pair in merges] + [BOS, EOS]
    return {token: index for index, token in enumerate(tokens)}


def small_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token -> id, merges): all bytes, so that any text can be encoded, and a few merges."""
    merges = [(left, right) for left, right in (merge.split() for merge in SMALL_MERGES)]
    return _vocabulary(merges), merges


def full_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token -> id, merges) of CLIP: 49,408 tokens, read from the file that open-clip-torch ships.

    The package is only located, never imported, because it is installed without its dependencies.
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise RuntimeError("the full tokenizer needs: pip install --no-deps open-clip-torch")
    with gzip.open(Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1:48895]  # after the header; the rest of the file is unused
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    return _vocabulary(merges), merges


def make_tokenizer(size: Size = "tiny") -> CLIPTokenizer:
    """A CLIPTokenizer that pads with `<|endoftext|>`. Its maximum length is that of the text encoder."""
    vocabulary, merges = full_vocabulary() if size == "full" else small_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=_TEXT_LENGTH[size])


def _smooth_images(generator: torch.Generator, count: int, side: int) -> torch.Tensor:
    """(count, 3, side, side) in [0, 1]: blurred noise with a little grain, roughly like photos."""
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    return (smooth + 0.05 * torch.randn(count, 3, side, side, generator=generator)).clamp(0, 1)


@torch.no_grad()
def _calibrate_vq(vqvae: Any, generator: torch.Generator) -> None:
    """Scales random VQ weights so that images use many codes, and codes decode to pixels within [0, 1].

    With the default initialisation, the codebook lies within +-1/V of zero and the encoder's outputs far from it. Most
    images then use only a handful of codes, and the decoder outputs nearly plain grey.
    """
    factor = 2 ** (len(vqvae.config.block_out_channels) - 1)
    codes = vqvae.config.num_vq_embeddings
    latents = vqvae.encode(_smooth_images(generator, 4, 8 * factor)).latents  # (4, C, 8, 8)
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    vqvae.quant_conv.weight /= std[:, None, None, None]
    vqvae.quant_conv.bias.sub_(mean).div_(std)
    scaled = (latents - mean[:, None, None]) / std[:, None, None]
    rows = scaled.permute(0, 2, 3, 1).flatten(0, 2)  # (256, C)
    picked = rows[torch.randint(len(rows), (codes,), generator=generator)]
    vqvae.quantize.embedding.weight.copy_(picked + 0.3 * torch.randn(picked.shape, generator=generator))

    ids = torch.randint(codes, (2, 64), generator=generator)
    shape = (2, 8, 8, vqvae.config.latent_channels)
    pixels = vqvae.decode(ids, force_not_quantize=True, shape=shape).sample  # (2, 3, 8f, 8f)
    mean, std = pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3))
    vqvae.decoder.conv_out.weight *= (0.2 / std)[:, None, None, None]
    vqvae.decoder.conv_out.bias.sub_(mean).mul_(0.2 / std).add_(0.5)


def make_pipeline(size: Size = "tiny", *, resolution: int | None = None, seed: int = 0) -> AmusedPipeline:
    """An AmusedPipeline with random fp32 weights, equal for equal arguments. The global RNG state is kept."""
    transformer = transformer_config(size, resolution)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        vqvae = VQModel(**vq_config(size)).eval()
        _calibrate_vq(vqvae, torch.Generator().manual_seed(seed))
        return AmusedPipeline(
            vqvae=vqvae,
            tokenizer=make_tokenizer(size),
            text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**text_config(size))).eval(),
            transformer=UVit2DModel(**transformer).eval(),
            scheduler=AmusedScheduler(mask_token_id=transformer["vocab_size"] - 1, masking_schedule="cosine"),
        )


def make_model_folder(path: str | Path, size: Size = "tiny", *, resolution: int | None = None, seed: int = 0) -> Path:
    """Writes a complete pipeline folder to path and returns path.

    resolution: 512 (default) or 256 for tiny and full; 32 (default) or 64 for toy.
    """
    path = Path(path)
    make_pipeline(size, resolution=resolution, seed=seed).save_pretrained(path)
    # transformers 5 writes only tokenizer.json. It still reads the older layout: vocab.json and merges.txt.
    make_tokenizer(size).backend_tokenizer.model.save(str(path / "tokenizer"))
    return path


def count_parameters(size: Size, resolution: int | None = None) -> dict[str, int]:
    """Parameter counts by component, from the meta device: this needs no memory and no arithmetic."""
    with torch.device("meta"):
        modules = {
            "transformer": UVit2DModel(**transformer_config(size, resolution)),
            "vqvae": VQModel(**vq_config(size)),
            "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**text_config(size))),
        }
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}


def pipeline_image(pipeline: AmusedPipeline, prompt: str, seed: int, size: int | None = None, **options: Any) -> Image:
    """The image that AmusedPipeline generates for a prompt, with noise from a CPU generator of this seed."""
    pipeline.set_progress_bar_config(disable=True)
    options |= {"height": size, "width": size, "generator": torch.Generator().manual_seed(seed)}
    return pipeline(prompt, **options).images[0]
