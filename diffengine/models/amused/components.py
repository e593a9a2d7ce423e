"""Where the five components of an aMUSEd model come from, and that they fit together.

Each is loaded from a folder or hub name, or built from sizes. Sizes that follow from another component (the
codebook's size, text widths, the mask id) are filled in, so none stands twice in a config.
"""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, final

import torch
from diffusers import AmusedScheduler, UVit2DModel, VQModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from diffengine.errors import UserError
from diffengine.models.amused.vocabulary import from_assets
from diffengine.models.loading import load_component

Origin = str | Mapping[str, Any] | None  # a folder or hub name, sizes, or "as `pretrained` says"
MODULES = ("vqvae", "text_encoder", "transformer")


@final
class Components:
    """The five components, each loaded when it is first asked for.

    Args:
        pretrained: a folder or hub name with all five in subfolders, or None.
        origins: for `vqvae`, `tokenizer`, `text_encoder`, `transformer`: another folder or hub name, or sizes.
        assets: the files of a vocabulary learnt from captions, where `tokenizer` is given by its size.
        seed: of the weights that are built from sizes.
    """

    def __init__(
        self, pretrained: str | None, origins: Mapping[str, Origin], assets: Mapping[str, str], seed: int
    ) -> None:
        self.pretrained = pretrained
        self.origins = {name: pretrained if origin is None else _sizes(origin) for name, origin in origins.items()}
        self._assets = assets
        self._seed = seed
        missing = [name for name, origin in self.origins.items() if origin is None]
        if missing:
            raise UserError(f"model has neither `pretrained` nor {', '.join(f'`{name}`' for name in missing)}")

    def from_sizes(self, name: str) -> bool:
        """Whether a component is built anew rather than loaded."""
        return isinstance(self.origins[name], Mapping)

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        if self.from_sizes("tokenizer"):
            return from_assets(self._assets)
        tokenizer = self._load("tokenizer", CLIPTokenizer.from_pretrained)
        if len(tokenizer) < 3:  # transformers 5 returns an empty one where there are no files, with no error
            raise UserError(
                f"no tokenizer files in '{self.origins['tokenizer']}': got a vocabulary of {len(tokenizer)}; expected "
                "vocab.json and merges.txt, or tokenizer.json"
            )
        return tokenizer

    @cached_property
    def text_config(self) -> CLIPTextConfig:
        """Of the text encoder; sizes are completed by the tokenizer's."""
        if not self.from_sizes("text_encoder"):
            return self._load("text_encoder", CLIPTextConfig.from_pretrained)
        sizes = dict(self.origins["text_encoder"])  # type: ignore[arg-type]
        ids = self.tokenizer
        follows = {
            "vocab_size": len(ids), "max_position_embeddings": ids.model_max_length,
            "bos_token_id": ids.bos_token_id, "eos_token_id": ids.eos_token_id, "pad_token_id": ids.pad_token_id,
            "projection_dim": sizes.get("hidden_size", 512),
        }  # fmt: skip
        return CLIPTextConfig(**{**follows, **sizes})

    @cached_property
    def vqvae_config(self) -> Mapping[str, Any]:
        return self._config("vqvae", VQModel)

    @cached_property
    def transformer_config(self) -> Mapping[str, Any]:
        """Of the transformer; sizes are completed by the VQ model's and the text encoder's."""
        sizes = self._config("transformer", UVit2DModel)
        if not self.from_sizes("transformer"):
            return sizes
        codes = self.vqvae_config["num_vq_embeddings"]
        given = self.origins["transformer"]
        follows = {
            "codebook_size": codes,
            "vocab_size": math.ceil((codes + 1) / 8) * 8,  # one more for the mask, rounded
            "encoder_hidden_size": self.text_config.hidden_size,
            "cond_embed_dim": self.text_config.projection_dim,
            "micro_cond_embed_dim": 5 * sizes["micro_cond_encode_dim"],
        }
        return {**sizes, **follows, **given}  # type: ignore[dict-item]

    @cached_property
    def scheduler(self) -> AmusedScheduler:
        if self.from_sizes("transformer") or self.pretrained is None:
            return AmusedScheduler(mask_token_id=self.transformer_config["vocab_size"] - 1)
        return self._load("scheduler", AmusedScheduler.from_pretrained)

    @cached_property
    def vqvae(self) -> VQModel:
        return self._module("vqvae", VQModel, lambda: VQModel.from_config(self.vqvae_config))

    @cached_property
    def text_encoder(self) -> CLIPTextModelWithProjection:
        return self._module(
            "text_encoder", CLIPTextModelWithProjection, lambda: CLIPTextModelWithProjection(self.text_config)
        )

    @cached_property
    def transformer(self) -> UVit2DModel:
        def initialised() -> UVit2DModel:
            model = UVit2DModel.from_config(self.transformer_config)
            initialise(model)
            return model

        return self._module("transformer", UVit2DModel, initialised)

    def check(self) -> None:
        """Hold the components against one another by their configs; no weights are read.

        Raises:
            UserError: all that does not fit, in one error.
        """
        faults = _faults(
            self.tokenizer, self.text_config, self.vqvae_config, self.transformer_config, self.scheduler.config
        )
        if faults:
            raise UserError("components do not fit together: " + "; ".join(faults))

    # ------------------------------------------------------------------------------------------ loading

    def _load(self, name: str, load: Callable[..., Any], **options: Any) -> Any:
        return load_component(str(self.origins.get(name, self.pretrained)), name, load, **options)

    def _config(self, name: str, kind: Any) -> dict[str, Any]:
        if self.from_sizes(name):
            defaults = {
                key: parameter.default
                for key, parameter in kind._get_init_signature().items()  # noqa: SLF001
            }
            return {**defaults, **self.origins[name]}  # type: ignore[dict-item]
        config = self._load(name, kind.load_config)
        return {key: value for key, value in config.items() if not key.startswith("_")}

    def _module(self, name: str, kind: Any, build: Callable[[], nn.Module]) -> Any:
        if self.from_sizes(name):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                return build()
        precision = "dtype" if name == "text_encoder" else "torch_dtype"  # transformers and diffusers differ
        return self._load(name, kind.from_pretrained, **{precision: torch.float32})


def _faults(tokenizer: Any, text: Any, vqvae: Mapping, transformer: Mapping, scheduler: Mapping) -> list[str]:
    """What does not fit, one line each. Each pair stands where two components meet."""
    end = tokenizer.eos_token_id
    highest = max(tokenizer.get_vocab().values())
    text_end = highest if text.eos_token_id == 2 else text.eos_token_id  # 2: CLIP takes the highest id in the row
    pairs = [
        ("tokenizer length", len(tokenizer), "text_encoder.vocab_size", text.vocab_size),
        ("tokenizer's end token", end, "the id text_encoder takes for it", text_end),
        ("transformer.codebook_size", transformer["codebook_size"], "vqvae codes", vqvae["num_vq_embeddings"]),
        ("transformer.vocab_size - 1", transformer["vocab_size"] - 1, "scheduler.mask_token_id",
         scheduler["mask_token_id"]),
        ("transformer.encoder_hidden_size", transformer["encoder_hidden_size"], "text_encoder.hidden_size",
         text.hidden_size),
        ("transformer.cond_embed_dim", transformer["cond_embed_dim"], "text_encoder.projection_dim",
         text.projection_dim),
        ("transformer.micro_cond_embed_dim", transformer["micro_cond_embed_dim"],
         "5 x micro_cond_encode_dim", 5 * transformer["micro_cond_encode_dim"]),
        ("vqvae.lookup_from_codebook", bool(vqvae["lookup_from_codebook"]), "what the pipeline needs", True),
    ]  # fmt: skip
    faults = [f"{name} is {got}, {other} is {expected}" for name, got, other, expected in pairs if got != expected]
    if transformer["vocab_size"] <= transformer["codebook_size"]:
        faults.append("transformer.vocab_size leaves no id for the mask above codebook_size")
    if tokenizer.model_max_length > text.max_position_embeddings:
        faults.append(
            f"tokenizer.model_max_length is {tokenizer.model_max_length}, text_encoder has "
            f"{text.max_position_embeddings} positions"
        )
    return faults


def initialise(transformer: UVit2DModel) -> None:
    """open-muse's initialisation of a U-ViT, which diffusers' class lacks.

    Truncated normal of std 0.02; embeddings of std sqrt(1/vocab_size); the head's first convolution zero and its
    last one copied from the embedding; every adaptive-norm projection zero.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embedding = transformer.embed.embeddings.weight
    nn.init.trunc_normal_(embedding, std=math.sqrt(1 / transformer.config.vocab_size))
    for name, module in transformer.named_modules():
        if name.endswith(("cond_embeds_mapper", "norm1.linear", "norm2.linear", "norm3.linear")):
            nn.init.zeros_(module.weight)
    head = transformer.mlm_layer
    nn.init.zeros_(head.conv1.weight)
    with torch.no_grad():
        head.conv2.weight.copy_(embedding[: transformer.config.codebook_size, :, None, None])


def _sizes(origin: str | Mapping[str, Any]) -> str | Mapping[str, Any]:
    """Sizes without the `type` that a config names for their check."""
    return origin if isinstance(origin, str) else {key: value for key, value in origin.items() if key != "type"}
