"""The masked-token model: caption and visible tokens in, cross entropy of the masked tokens out.

Legend: B batch, h w token grid, T text length, D text width, V codebook size, M masked tokens.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from diffusers import AmusedScheduler, VQModel
from torch import Tensor, nn

from diffengine.errors import UserError, require
from diffengine.models import adapters as peft_adapters
from diffengine.models.amused.components import Components
from diffengine.models.amused.encoder import AmusedEncoder
from diffengine.models.amused.preprocessor import AmusedPreprocessor, encode_ids
from diffengine.models.amused.sampler import AmusedSampler
from diffengine.models.amused.transformer import blocks_of, group_of, head, trunk
from diffengine.models.amused.vocabulary import learn_vocabulary
from diffengine.models.base import Batch, LabelledImage, MaskedImageModel, PreviewRequest
from diffengine.models.blocks import wrap_blocks
from diffengine.models.frozen import Frozen, evaluating, hold_in, restored
from diffengine.models.generation import GenerationOptions, ImageRequest
from diffengine.models.loading import component_folder
from diffengine.models.masking import RandomMask, Schedule, TokenGrid, mask_tokens, sums_by_bucket, sums_by_source

TRAINABLE = ("transformer", "text_encoder")
PREVIEW_OPTIONS = ("guidance_scale", "num_inference_steps", "temperature", "strip")


@final
class AmusedModel(MaskedImageModel):
    """aMUSEd, trained as its authors did: cross entropy over masked tokens.

    Args:
        pretrained: a folder or hub name that holds all five components, such as "amused/amused-512".
        vqvae, tokenizer, text_encoder, transformer: instead of `pretrained`, for one component: a folder or hub name,
            or `dict(...)` of sizes to build it from scratch. The tokenizer's are `vocab_size` and `max_length`: a
            byte-pair vocabulary is learnt from the captions. Sizes that follow from other components can be left out.
        train: the components to train in full. None: the transformer, unless there are adapters.
        adapters: the components to train by an adapter of peft, each with its config:
            `dict(transformer=dict(type=LoraConfig, r=16, lora_alpha=32, target_modules=["to_q", "to_k"]))`. The base
            does not change. One component may have an adapter while the other is trained in full.
        gradient_checkpointing: run blocks again in the backward pass: less memory, more time, equal gradients.
        mask_schedule: "cosine" or "linear", see `masking.num_masked`.
        label_smoothing: in [0, 1), as in `torch.nn.functional.cross_entropy`.
        vq_batch_size: images that the VQ model encodes at once.
        assets: files of a learnt vocabulary, given by the run.
        seed: of adapters and of weights built from scratch, given by the run.

    Raises:
        UserError: a config cannot be loaded; an option is out of range, components do not fit together, or one built
            from scratch is frozen (all in one error, before weights are read); an adapter does not fit its component.
    """

    def __init__(
        self, pretrained: str | None = None, *,
        vqvae: str | dict | None = None, tokenizer: str | dict | None = None,
        text_encoder: str | dict | None = None, transformer: str | dict | None = None,
        train: list[Literal["transformer", "text_encoder"]] | tuple[str, ...] | None = None,
        adapters: dict | None = None, gradient_checkpointing: bool = False,
        mask_schedule: Schedule = "cosine", label_smoothing: float = 0.0, vq_batch_size: int = 8,
        assets: Mapping[str, str] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        origins = {"vqvae": vqvae, "tokenizer": tokenizer, "text_encoder": text_encoder, "transformer": transformer}
        self.components = Components(pretrained, origins, assets or {}, seed)
        adapters = adapters or {}
        if train is None:
            train = () if adapters else ("transformer",)
        problems = self._problems(train, adapters, label_smoothing, vq_batch_size)
        require(not problems, "model: " + "; ".join(problems))
        self._checkpointed = gradient_checkpointing
        self.label_smoothing, self.mask_schedule = label_smoothing, mask_schedule
        self.num_codes: int = self.components.transformer_config["codebook_size"]
        grid = TokenGrid.of(self.components.vqvae_config, self.components.transformer_config)
        self.side: int = self.components.transformer_config["sample_size"] * grid.factor
        self.size_multiple = grid.pixels
        self.mask_id: int = self.components.scheduler.config.mask_token_id
        self._frozen: dict[str, Frozen] = {"vqvae": Frozen(self._load_vqvae)}
        for name in TRAINABLE:
            load = partial(self._load, name, adapters.get(name))
            if name in train or name in adapters:
                self.add_module(name, load())
            else:
                self._frozen[name] = Frozen(load)
        self.preprocessor = AmusedPreprocessor(self._frozen["vqvae"], self.components.tokenizer, vq_batch_size)

    def _load_vqvae(self) -> VQModel:
        """The VQ model, whose encoder's activations overwrite the norms' outputs: nothing else reads those."""
        vqvae = self.components.load("vqvae")
        for layer in vqvae.encoder.modules():
            if isinstance(layer, nn.SiLU):
                layer.inplace = True
        return vqvae

    def _load(self, name: str, adapter: Any) -> nn.Module:
        """A component with its adapter; checkpointed even if frozen, since gradients may pass through it."""
        module = self.components.load(name).requires_grad_(True)
        if adapter is not None:
            config = peft_adapters.read_config(adapter, name)
            config.base_model_name_or_path = self.components.describe_origin(name)
            peft_adapters.inject(module, config, name, self.components.seed)
        if self._checkpointed:
            wrap_blocks(blocks_of(module), checkpointed=True, compiled=False)
        return module

    def _problems(self, train: Iterable[str], adapters: dict, label_smoothing: float, vq_batch_size: int) -> list[str]:
        problems = []
        if any(name not in TRAINABLE for name in train) or not (list(train) or adapters):
            problems.append(f"train got {list(train)}; expected one or both of {list(TRAINABLE)}, or [] with adapters")
        for name, adapter in adapters.items():
            if name not in TRAINABLE:
                problems.append(f"adapters got '{name}'; expected one or both of {list(TRAINABLE)}")
            elif name in train:
                problems.append(f"{name} is both in `train` and in `adapters`; name it in one of them")
            elif self.components.from_sizes(name):
                problems.append(f"{name} is built from sizes, so an adapter has no base: give a folder for it")
            else:
                try:
                    peft_adapters.read_config(adapter, name)
                except UserError as error:
                    problems.append(str(error))
        if not 0 <= label_smoothing < 1:
            problems.append(f"label_smoothing got {label_smoothing}; expected a number in [0, 1)")
        if vq_batch_size < 1:
            problems.append(f"vq_batch_size got {vq_batch_size}; expected at least 1")
        for name in ("vqvae", *TRAINABLE):
            if name not in (*train, *adapters) and self.components.from_sizes(name):
                remedy = "give a folder for it" + ("" if name == "vqvae" else ", or name it in `train`")
                problems.append(f"{name} is built from sizes and not trained, so its weights would be lost: {remedy}")
        return problems + self.components.problems()

    @classmethod
    def learn_assets(cls, options: Mapping[str, Any], captions: Callable[[], Iterable[str]]) -> dict[str, str]:
        sizes = options.get("tokenizer")
        if not isinstance(sizes, Mapping):
            return {}
        if unknown := sizes.keys() - {"vocab_size", "max_length"}:
            raise UserError(f"model.tokenizer: unknown key '{min(unknown)}'; it takes vocab_size and max_length")
        return learn_vocabulary(captions(), sizes.get("vocab_size", 1024), sizes.get("max_length", 77))

    @property
    def assets(self) -> dict[str, str]:
        return self.components.assets

    @property
    def sample_transform(self) -> RandomMask:
        grid = TokenGrid.of(self.components.vqvae_config, self.components.transformer_config)
        return RandomMask(grid, self.mask_schedule)

    @property
    def encoder(self) -> AmusedEncoder:
        text_encoder, text_config = self._frozen.get("text_encoder"), self.components.text_config
        return AmusedEncoder(self.preprocessor, text_encoder, text_config, self.encode_text, self.device)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def caption_lengths(self, captions: Sequence[str]) -> tuple[list[int], int]:
        tokenizer = self.components.tokenizer
        ids = tokenizer(list(captions), verbose=False).input_ids if captions else []
        return list(map(len, ids)), tokenizer.model_max_length

    def prepare(self, batch: Batch) -> Batch:
        return self.preprocessor(batch, self.device)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As in the contract, over masked tokens; with `target_weights` (M,), loss and logs are weighted sums."""
        index, token_ids = batch["masked_index"], batch["token_ids"]
        if "pooled_text_emb" in batch:
            hidden_BTD, pooled_BD = batch["hidden_states"], batch["pooled_text_emb"]
        else:
            hidden_BTD, pooled_BD = self.encode_text(batch["text_ids"])
        transformer = self.module("transformer")
        masked = mask_tokens(token_ids, index, self.mask_id)
        logits_MV = head(transformer, trunk(transformer, masked, batch["micro_conds"], hidden_BTD, pooled_BD), index)
        logits_MV = logits_MV.float()
        targets_M = token_ids.flatten().index_select(0, index)
        correct_M = (logits_MV.argmax(dim=1) == targets_M).float()
        loss_M = F.cross_entropy(logits_MV, targets_M, label_smoothing=self.label_smoothing, reduction="none")
        if "target_weights" in batch:
            loss_M, correct_M = loss_M * batch["target_weights"], correct_M * batch["target_weights"]
        logs = {"accuracy": correct_M.sum()}
        if "bucket" in batch:
            logs["loss_t"] = sums_by_bucket(loss_M.detach(), index, batch["bucket"], token_ids[0].numel())
        if "source" in batch:
            logs["loss_by_source"] = sums_by_source(loss_M.detach(), index, batch["source"], token_ids[0].numel())
        return loss_M.sum(), logs

    def encode_text(self, text_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Caption ids (B,T) as in AmusedPipeline: `hidden_states[-2]` (B,T,D) and `text_embeds` (B,D)."""
        with torch.set_grad_enabled("text_encoder" not in self._frozen and torch.is_grad_enabled()):
            return encode_ids(self.module("text_encoder"), text_ids)

    def module(self, name: str) -> Any:
        """A component on the model's device, trained or frozen."""
        return self._frozen[name].on(self.device) if name in self._frozen else getattr(self, name)

    def compile_blocks(self) -> int:
        """The transformer's only: the text encoder is small, and the hooks for `hidden_states` break its graphs."""
        blocks = blocks_of(self.module("transformer"))
        wrap_blocks(blocks, checkpointed=self._checkpointed, compiled=True)
        return len(blocks)

    def gradient_group(self, name: str) -> str:
        """The text encoder, and the transformer's by `group_of`; an adapter's parameters are with their layer's."""
        component, _, rest = name.partition(".")
        return group_of(rest) if component == "transformer" else component

    def hold_frozen(self, dtype: torch.dtype) -> None:
        """Those of adapters' bases and of frozen components; the VQ model stays in fp32."""
        for name in TRAINABLE:
            if name in self._frozen:
                self._frozen[name].hold(dtype)
            elif peft_adapters.leaves_base_alone(getattr(self, name)):
                hold_in(getattr(self, name), dtype)

    @property
    def chance_loss(self) -> tuple[str, float]:
        return f"ln {self.num_codes}", math.log(self.num_codes)

    @property
    def sources(self) -> dict[str, Path]:
        origins = {**self.components.origins, "scheduler": self.components.pretrained}
        folders = {name: component_folder(origin, name) for name, origin in origins.items() if isinstance(origin, str)}
        return {name: folder for name, folder in folders.items() if folder is not None}

    @property
    def origin(self) -> str:
        return ", ".join(dict.fromkeys(map(self.components.describe_origin, self.components.origins)))

    def base(self, name: str) -> nn.Module:
        return self.components.load(name)

    def probe(self, name: str, module: Any) -> Tensor:
        """The transformer's logits for one image, half of it masked; of the text encoder, both outputs."""
        rng = torch.Generator().manual_seed(0)
        sizes = module.config
        with evaluating(module):
            if name == "text_encoder":
                ids = torch.randint(sizes.vocab_size, (1, sizes.max_position_embeddings), generator=rng)
                output = module(ids, output_hidden_states=True, return_dict=True)
                return torch.cat([output.hidden_states[-2].flatten(), output.text_embeds.flatten()])
            token_ids = torch.randint(sizes.codebook_size, (1, sizes.sample_size, sizes.sample_size), generator=rng)
            masked = token_ids.masked_fill(torch.rand(token_ids.shape, generator=rng) < 0.5, sizes.vocab_size - 1)
            length = self.components.tokenizer.model_max_length
            hidden = torch.randn(1, length, sizes.encoder_hidden_size, generator=rng)
            pooled = torch.randn(1, sizes.cond_embed_dim, generator=rng)
            return module(masked, hidden, pooled, torch.tensor([[512.0, 512.0, 0.0, 0.0, 6.0]]))

    @property
    def pipeline_components(self) -> dict[str, Any]:
        """The scheduler is a copy, since AmusedInpaintPipeline changes one that it shares to "linear"."""
        modules = {name: self.module(name) for name in ("vqvae", *TRAINABLE)}
        scheduler = AmusedScheduler.from_config(self.components.scheduler.config)
        return {**modules, "tokenizer": self.components.tokenizer, "scheduler": scheduler}

    def sampler(self) -> AmusedSampler:
        modules = {name: self.module(name) for name in ("vqvae", *TRAINABLE)}
        scheduler = self.components.scheduler
        return AmusedSampler(**modules, tokenizer=self.components.tokenizer, scheduler=scheduler,
                             guidance_scale=self.guidance_scale, mask_schedule=self.mask_schedule)  # fmt: skip

    def preview(self, request: PreviewRequest) -> list[LabelledImage]:
        """Generate from the prompts; with the option `strip`, also show the first prompt after each generation step."""
        for name in request.options:
            known = name in PREVIEW_OPTIONS
            require(known, f"preview option '{name}' is unknown; expected one of {', '.join(PREVIEW_OPTIONS)}")
        options = GenerationOptions(**{name: value for name, value in request.options.items() if name != "strip"})
        sizes = request.sizes or repeat(None)
        requests = [
            ImageRequest(prompt, request.seed + index, size=size)
            for index, (prompt, size) in enumerate(zip(request.prompts, sizes))
        ]
        with restored(self._frozen.values()), evaluating(self):
            sampler = self.sampler()
            generated = sampler.generate(requests, options)
            images = [LabelledImage(prompt, image) for prompt, image in zip(request.prompts, generated)]
            if requests and request.options.get("strip"):
                steps = sampler.generate_steps(requests[0], options)
                images += [LabelledImage(f"step {index + 1}", image) for index, image in enumerate(steps)]
        return images
