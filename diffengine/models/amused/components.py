"""The five components of an aMUSEd model: where each comes from, and whether they fit together.

Each is loaded from a folder or hub name, or built from sizes. Sizes that follow from another component (the codebook's
size, text widths, the mask id) are filled in, so a config states none twice.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from diffusers import AmusedScheduler, UVit2DModel, VQModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from diffengine.errors import UserError
from diffengine.models.amused.vocabulary import from_assets
from diffengine.models.loading import component_folder, load_component, load_module, seeded, unknown_sizes

CLASSES = {"vqvae": VQModel, "text_encoder": CLIPTextModelWithProjection, "transformer": UVit2DModel}
Origin = str | Mapping[str, Any] | None  # a folder or hub name, sizes, or None: from `pretrained`


@final
class Components:
    """The five components, each loaded on first use; the global random state is left alone.

    Args:
        pretrained: a folder or hub name with all five in subfolders, or None.
        origins: for `vqvae`, `tokenizer`, `text_encoder`, `transformer`: another folder, hub name, or sizes.
        assets: the files of a vocabulary learnt from captions, where `tokenizer` is given by its size.
        seed: of the weights that are built from sizes.

    Raises:
        UserError: a component has no origin.
    """

    def __init__(
        self, pretrained: str | None, origins: Mapping[str, Origin], assets: Mapping[str, str], seed: int
    ) -> None:
        self.pretrained = pretrained
        self.origins = {
            name: pretrained if origin is None else _without_type(origin) for name, origin in origins.items()
        }
        self._assets = assets
        self._seed = seed
        missing = [f"`{name}`" for name, origin in self.origins.items() if origin is None]
        if missing:
            raise UserError(f"model has neither `pretrained` nor {', '.join(missing)}")

    def from_sizes(self, name: str) -> bool:
        """Whether a component is built from scratch rather than loaded."""
        return isinstance(self.origins[name], Mapping)

    @property
    def sources(self) -> dict[str, Path]:
        """The local folders that components are loaded from."""
        origins = {**self.origins, "scheduler": self.pretrained}
        folders = {name: component_folder(origin, name) for name, origin in origins.items() if isinstance(origin, str)}
        return {name: folder for name, folder in folders.items() if folder is not None}

    def describe_origin(self, name: str) -> str:
        """The name of a loaded component that is valid anywhere: a hub name, or a folder's absolute path."""
        origin = str(self.origins[name])
        folder = Path(origin).expanduser()
        return str(folder.resolve()) if folder.is_dir() else origin

    def load_again(self, name: str) -> Any:
        """A transformer or text encoder as it was before training."""
        return load_module(str(self.origins[name]), name, CLASSES[name])

    # ------------------------------------------------------------------------------------------ configs

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        if self.from_sizes("tokenizer"):
            tokenizer, origin = from_assets(self._assets), "the run's assets"
        else:
            tokenizer, origin = (
                self._load("tokenizer", CLIPTokenizer.from_pretrained),
                str(self.origins["tokenizer"]),
            )
        if len(tokenizer) < 3:  # transformers 5 returns an empty one where there are no files, with no error
            raise UserError(
                f"no tokenizer files in '{origin}': got a vocabulary of {len(tokenizer)}; expected "
                "vocab.json and merges.txt, or tokenizer.json"
            )
        return tokenizer

    @cached_property
    def text_config(self) -> CLIPTextConfig:
        """Of the text encoder; the tokenizer completes its sizes."""
        if not self.from_sizes("text_encoder"):
            return self._load("text_encoder", CLIPTextConfig.from_pretrained)
        sizes = dict(self.origins["text_encoder"])  # type: ignore[arg-type]
        ids = self.tokenizer
        follows = {
            "vocab_size": len(ids), "max_position_embeddings": ids.model_max_length,
            "bos_token_id": ids.bos_token_id, "eos_token_id": ids.eos_token_id,
            "pad_token_id": ids.pad_token_id, "projection_dim": sizes.get("hidden_size", 512),
        }  # fmt: skip
        return CLIPTextConfig(**{**follows, **sizes})

    @cached_property
    def vqvae_config(self) -> Mapping[str, Any]:
        return self._config("vqvae", VQModel)

    @cached_property
    def transformer_config(self) -> Mapping[str, Any]:
        """Of the transformer; the VQ model and the text encoder complete its sizes."""
        config = self._config("transformer", UVit2DModel)
        if not self.from_sizes("transformer"):
            return config
        codes = self.vqvae_config["num_vq_embeddings"]
        follows = {
            "codebook_size": codes,
            "vocab_size": math.ceil((codes + 1) / 8) * 8,  # one more for the mask, rounded
            "encoder_hidden_size": self.text_config.hidden_size,
            "cond_embed_dim": self.text_config.projection_dim,
            "micro_cond_embed_dim": 5 * config["micro_cond_encode_dim"],
        }
        return {**config, **follows, **self.origins["transformer"]}  # type: ignore[dict-item]

    @cached_property
    def scheduler(self) -> AmusedScheduler:
        if self.from_sizes("transformer") or self.pretrained is None:
            return AmusedScheduler(mask_token_id=self.transformer_config["vocab_size"] - 1)
        return self._load("scheduler", AmusedScheduler.from_pretrained)

    def problems(self) -> list[str]:
        """What does not fit between components, by their configs; no weights are read.

        Raises:
            UserError: a config cannot be loaded.
        """
        text = self.text_config  # first: for a name that does not exist, the tokenizer is empty and no error
        unknown: list[str] = []
        for name, cls in CLASSES.items():
            origin = self.origins[name]
            if isinstance(origin, Mapping):
                unknown += unknown_sizes(name, origin, cls)
        return unknown or _problems(
            self.tokenizer,
            text,
            self.vqvae_config,
            self.transformer_config,
            self.scheduler.config,
        )

    # ------------------------------------------------------------------------------------------ weights

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

    def _load(self, name: str, load: Callable[..., Any]) -> Any:
        return load_component(str(self.origins.get(name, self.pretrained)), name, load)

    def _config(self, name: str, cls: Any) -> dict[str, Any]:
        """A diffusers component's config with its class's defaults."""
        options = inspect.signature(cls).parameters
        defaults = {key: option.default for key, option in options.items() if option.default is not option.empty}
        if self.from_sizes(name):
            return {**defaults, **self.origins[name]}  # type: ignore[dict-item]
        config = self._load(name, cls.load_config)
        if config.get("_class_name", cls.__name__) != cls.__name__:
            raise UserError(f"{name} of '{self.origins[name]}' is a {config['_class_name']}; expected a {cls.__name__}")
        return {**defaults, **{key: value for key, value in config.items() if not key.startswith("_")}}

    def _module(self, name: str, cls: Any, build: Callable[[], nn.Module]) -> Any:
        if not self.from_sizes(name):
            return load_module(str(self.origins[name]), name, cls)
        with seeded(self._seed):
            return build()


def _problems(tokenizer: Any, text: Any, vqvae: Mapping, transformer: Mapping, scheduler: Mapping) -> list[str]:
    """What does not fit, a line each; each pair must be equal where two components meet."""
    text_end = text.eos_token_id
    if text_end == 2:  # in the released config: CLIP takes the highest id in the row for the end
        text_end = max(tokenizer.get_vocab().values())
    latents = vqvae["latent_channels"]
    pairs = [
        ("tokenizer length", len(tokenizer), "text_encoder.vocab_size", text.vocab_size),
        ("tokenizer's end token", tokenizer.eos_token_id, "the id text_encoder takes for it", text_end),
        ("transformer.codebook_size", transformer["codebook_size"],
         "vqvae.num_vq_embeddings", vqvae["num_vq_embeddings"]),
        ("transformer.vocab_size - 1", transformer["vocab_size"] - 1,
         "scheduler.mask_token_id", scheduler["mask_token_id"]),
        ("transformer.encoder_hidden_size", transformer["encoder_hidden_size"],
         "text_encoder.hidden_size", text.hidden_size),
        ("transformer.cond_embed_dim", transformer["cond_embed_dim"],
         "text_encoder.projection_dim", text.projection_dim),
        ("transformer.micro_cond_embed_dim", transformer["micro_cond_embed_dim"],
         "5 x micro_cond_encode_dim", 5 * transformer["micro_cond_encode_dim"]),
        ("vqvae.lookup_from_codebook", bool(vqvae["lookup_from_codebook"]), "what the pipeline needs", True),
        ("vqvae.vq_embed_dim", vqvae["vq_embed_dim"] or latents, "vqvae.latent_channels", latents),
    ]  # fmt: skip
    problems = [f"{name} is {got}, {other} is {expected}" for name, got, other, expected in pairs if got != expected]
    if transformer["vocab_size"] <= transformer["codebook_size"]:
        problems.append("transformer.vocab_size leaves no id for the mask above codebook_size")
    if tokenizer.model_max_length > text.max_position_embeddings:
        problems.append(
            f"tokenizer.model_max_length is {tokenizer.model_max_length}, text_encoder has "
            f"{text.max_position_embeddings} positions"
        )
    return problems


def initialise(transformer: UVit2DModel) -> None:
    """open-muse's initialisation of a U-ViT (`modeling_transformer_v2.py`), which diffusers' class lacks.

    Truncated normal of std 0.02; embeddings of std sqrt(1/vocab_size); the head's first convolution zero and
    its last one copied from the embedding; every adaptive-norm projection zero. open-muse differs in two points: it
    shrinks `embed.conv` further, and leaves the transposed convolution that upsamples at torch's default.
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


def _without_type(origin: str | Mapping[str, Any]) -> str | Mapping[str, Any]:
    """Sizes without the `type` that a config names for validation."""
    return origin if isinstance(origin, str) else {key: value for key, value in origin.items() if key != "type"}
