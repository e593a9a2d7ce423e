"""The five components of an aMUSEd model: loaded from a folder or hub name, or built from sizes, and checked together.

Sizes that follow from another component (the codebook's size, text widths, the mask id) can be left out.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, final

import torch
from diffusers import AmusedScheduler, UVit2DModel, VQModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from diffengine.errors import require
from diffengine.files import expanded
from diffengine.models.amused.preprocessor import caption_ids
from diffengine.models.amused.vocabulary import from_assets
from diffengine.models.loading import load_component, load_module, seeded, unknown_sizes
from diffengine.signatures import problems_against, sizes_out_of_range
from diffengine.text import one_line

MOST = 4096  # tokens of a caption, or in a row of an image
CLASSES = {"vqvae": VQModel, "text_encoder": CLIPTextModelWithProjection, "transformer": UVit2DModel}


@final
class Components:
    """The configs, tokenizer, scheduler and weights of an aMUSEd model; the global random state is left alone.

    `origins` has a folder, hub name or sizes for `vqvae`, `tokenizer`, `text_encoder` and `transformer`; None stands
    for a subfolder of `pretrained`. `assets` are the files of a learnt vocabulary.
    """

    def __init__(self, pretrained: str | None, origins: Mapping, assets: Mapping[str, str], seed: int) -> None:
        self.pretrained, self.assets, self.seed = pretrained, dict(assets), seed
        self.origins: dict[str, Any] = {}  # by name: a folder, a hub name, or sizes
        for name, origin in origins.items():
            if isinstance(origin, Mapping):  # a config names the class for validation
                origin = {key: value for key, value in origin.items() if key != "type"}
            self.origins[name] = pretrained if origin is None else origin
        missing = [f"`{name}`" for name, origin in self.origins.items() if origin is None]
        require(not missing, f"model has neither `pretrained` nor {', '.join(missing)}")

    def from_sizes(self, name: str) -> bool:
        """Whether a component is built from scratch rather than loaded."""
        return isinstance(self.origins[name], Mapping)

    def describe_origin(self, name: str) -> str:
        """The name of a loaded component that is valid anywhere: a hub name, or a folder's absolute path."""
        folder = expanded(self.origins[name])
        return str(folder.resolve()) if folder.is_dir() else self.origins[name]

    def load(self, name: str) -> Any:
        """Component `name` before training: loaded, or built from sizes with weights from the seed."""
        if not self.from_sizes(name):
            return load_module(self.origins[name], name, CLASSES[name])
        with seeded(self.seed):
            if name == "text_encoder":
                return CLIPTextModelWithProjection(self.text_config)
            if name == "vqvae":
                return VQModel.from_config(self.vqvae_config)
            return initialise(UVit2DModel.from_config(self.transformer_config))

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        if self.from_sizes("tokenizer"):
            tokenizer, origin = from_assets(self.assets), "the run's assets"
        else:
            tokenizer, origin = self._read("tokenizer", CLIPTokenizer.from_pretrained), self.origins["tokenizer"]
        require(
            len(tokenizer) >= 3,  # without any files transformers 5 returns an empty one, and no error
            f"no tokenizer files in '{origin}': got a vocabulary of {len(tokenizer)}; expected vocab.json and "
            "merges.txt, or tokenizer.json",
        )
        return tokenizer

    @cached_property
    def text_config(self) -> CLIPTextConfig:
        """Of the text encoder; the tokenizer completes its sizes."""
        if not self.from_sizes("text_encoder"):
            return self._read("text_encoder", CLIPTextConfig.from_pretrained)
        sizes, tokenizer = self.origins["text_encoder"], self.tokenizer
        special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        follows = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length, **special}
        return CLIPTextConfig(**{"projection_dim": sizes.get("hidden_size", 512), **follows, **sizes})

    @cached_property
    def vqvae_config(self) -> Mapping[str, Any]:
        return self._config("vqvae")

    @cached_property
    def transformer_config(self) -> Mapping[str, Any]:
        """Of the transformer; the VQ model and the text encoder complete its sizes."""
        config = self._config("transformer")
        if not self.from_sizes("transformer"):
            return config
        codes, text = self.vqvae_config["num_vq_embeddings"], self.text_config
        follows = {
            "codebook_size": codes,
            "vocab_size": math.ceil((codes + 1) / 8) * 8,  # one more for the mask, rounded
            "encoder_hidden_size": text.hidden_size,
            "cond_embed_dim": text.projection_dim,
            "micro_cond_embed_dim": 5 * config["micro_cond_encode_dim"],
        }
        return {**config, **follows, **self.origins["transformer"]}

    @cached_property
    def scheduler(self) -> AmusedScheduler:
        if self.from_sizes("transformer") or self.pretrained is None:
            return AmusedScheduler(mask_token_id=self.transformer_config["vocab_size"] - 1)
        return self._read("scheduler", AmusedScheduler.from_pretrained)

    def problems(self) -> list[str]:
        """What does not fit between components, by their configs; no weights are read.

        Raises:
            UserError: a config cannot be loaded.
        """
        sizes = {name: self.origins[name] for name in CLASSES if self.from_sizes(name)}
        unknown = [line for name, given in sizes.items() for line in unknown_sizes(name, given, CLASSES[name])]
        unknown += [line for name, given in sizes.items() for line in sizes_out_of_range(name, given)]
        return unknown or self._wrong_values() or self._mismatches()

    def _wrong_values(self) -> list[str]:
        """Values of configs that have another type than their class takes, or that no model has."""
        self.text_config  # noqa: B018 - first: if its folder does not exist, the tokenizer is empty, without an error
        problems = []
        configs = {"vqvae": self.vqvae_config, "transformer": self.transformer_config}
        quantized = {**configs, "text_encoder": self.text_config.to_dict()}
        problems += [f"{name} is quantized" for name, config in quantized.items() if config.get("quantization_config")]
        for name, config in configs.items():
            known = {key: value for key, value in config.items() if key in inspect.signature(CLASSES[name]).parameters}
            problems += problems_against(CLASSES[name], known, name, {"self"})
        schedule, known_schedules = self.scheduler.config.masking_schedule, ("cosine", "linear")
        if schedule not in known_schedules:
            problems.append(f"scheduler.masking_schedule is {schedule!r}; expected {' or '.join(known_schedules)}")
        if problems:
            return problems
        numbers = {
            "tokenizer.model_max_length": self.tokenizer.model_max_length,
            "transformer.sample_size": self.transformer_config["sample_size"],
            "levels of vqvae.block_out_channels": len(self.vqvae_config["block_out_channels"]),
        }
        return [
            f"{name} is {number!r}; expected 1 to {MOST}"
            for name, number in numbers.items() if type(number) is not int or not 1 <= number <= MOST
        ]  # fmt: skip

    def _mismatches(self) -> list[str]:
        text = self.text_config  # first: if its folder does not exist, the tokenizer is empty, without an error
        tokenizer, vqvae, sizes = self.tokenizer, self.vqvae_config, self.transformer_config
        mask_id = self.scheduler.config.mask_token_id
        text_end = text.eos_token_id
        if text_end == 2:  # in the released config: CLIP takes the highest id in the row for the end
            text_end = max(tokenizer.get_vocab().values())
        codes, latents = vqvae["num_vq_embeddings"], vqvae["latent_channels"]
        width, micro = text.hidden_size, 5 * sizes["micro_cond_encode_dim"]
        pairs = [
            ("tokenizer length", len(tokenizer), "text_encoder.vocab_size", text.vocab_size),
            ("tokenizer's end token", tokenizer.eos_token_id, "the id text_encoder takes for it", text_end),
            ("transformer.codebook_size", sizes["codebook_size"], "vqvae.num_vq_embeddings", codes),
            ("transformer.vocab_size - 1", sizes["vocab_size"] - 1, "scheduler.mask_token_id", mask_id),
            ("transformer.encoder_hidden_size", sizes["encoder_hidden_size"], "text_encoder.hidden_size", width),
            ("transformer.cond_embed_dim", sizes["cond_embed_dim"], "text_encoder.projection_dim", text.projection_dim),
            ("transformer.micro_cond_embed_dim", sizes["micro_cond_embed_dim"], "5 x micro_cond_encode_dim", micro),
            ("vqvae.lookup_from_codebook", bool(vqvae["lookup_from_codebook"]), "what the pipeline needs", True),
            ("vqvae.vq_embed_dim", vqvae["vq_embed_dim"] or latents, "vqvae.latent_channels", latents),
            ("text_encoder.return_dict", text.return_dict, "what we read its outputs by", True),
        ]
        problems = [f"{name} is {got}, {other} is {wanted}" for name, got, other, wanted in pairs if got != wanted]
        if sizes["vocab_size"] <= sizes["codebook_size"]:
            problems.append("transformer.vocab_size leaves no id for the mask above codebook_size")
        length, most = tokenizer.model_max_length, text.max_position_embeddings
        if length > most:
            problems.append(f"tokenizer.model_max_length is {length}, text_encoder has {most} positions")
        return problems or self._wrong_ids()

    def _wrong_ids(self) -> list[str]:
        """Whether the tokenizer makes ids that the text encoder has no embedding of, found by using it."""
        tokenizer, limit = self.tokenizer, self.text_config.vocab_size
        try:
            shape, ids = caption_ids(tokenizer, ["", "a cat"]).shape, tokenizer.get_vocab().values()
        except Exception as error:  # noqa: BLE001 - its files say what it does
            return [f"tokenizer cannot be used: {one_line(error)[:200]}"]
        problems = []
        if shape != (2, tokenizer.model_max_length):
            problems.append(f"tokenizer makes {tuple(shape)} ids of two captions, model_max_length is {shape[1]}")
        if not all(0 <= number < limit for number in ids):
            problems.append(f"tokenizer has the id {max(ids)}, text_encoder.vocab_size is {limit}")
        return problems

    def _read(self, name: str, load: Callable[..., Any]) -> Any:
        return load_component(str(self.origins.get(name, self.pretrained)), name, load)

    def _config(self, name: str) -> dict[str, Any]:
        """A diffusers component's config with its class's defaults."""
        cls = CLASSES[name]
        options = inspect.signature(cls).parameters
        defaults = {key: option.default for key, option in options.items() if option.default is not option.empty}
        if self.from_sizes(name):
            return {**defaults, **self.origins[name]}
        config = self._read(name, cls.load_config)
        found = config.get("_class_name", cls.__name__)
        require(found == cls.__name__, f"{name} of '{self.origins[name]}' is a {found}; expected a {cls.__name__}")
        return {**defaults, **{key: value for key, value in config.items() if not key.startswith("_")}}


def initialise(transformer: UVit2DModel) -> UVit2DModel:
    """Initialise a U-ViT in place as open-muse does (`modeling_transformer_v2.py`), and return it.

    Truncated normal of std 0.02; embeddings of std sqrt(1/vocab_size); the head's first convolution zero and its last
    one copied from the embedding; every adaptive-norm projection zero. open-muse differs in two points: it shrinks
    `embed.conv` further, and leaves the transposed convolution that upsamples at torch's default.
    """
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if name.endswith(("cond_embeds_mapper", "norm1.linear", "norm2.linear", "norm3.linear")):
            nn.init.zeros_(module.weight)
    embedding = transformer.embed.embeddings.weight
    nn.init.trunc_normal_(embedding, std=math.sqrt(1 / transformer.config.vocab_size))
    head = transformer.mlm_layer
    nn.init.zeros_(head.conv1.weight)
    with torch.no_grad():
        head.conv2.weight.copy_(embedding[: transformer.config.codebook_size, :, None, None])
    return transformer
