"""peft's adapters, injected into a component: a few trained weights next to a base that does not change."""

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoKrConfig, LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from diffengine.errors import UserError, require
from diffengine.files import check_regular, read_json
from diffengine.models.loading import seeded
from diffengine.registry import resolve
from diffengine.signatures import problems_of
from diffengine.text import one_line

CONFIG, WEIGHTS, DIFFUSERS_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", LORA_WEIGHT_NAME_SAFE
NAME = "default"  # peft's own

# Options that train or change weights outside the adapter, which diffusers' loader does not know.
UNSAVED_OPTIONS = ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters")
LARGEST_RANK = 2**13  # above the width of any layer, so more trains nothing new
# Options by which peft imports a module.
CODE_OPTIONS = ("megatron_config",)
# Options that may be a pattern.
PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")
# Methods that need their own calls during training.
UNSUPPORTED = ("ADALORA", "ADAMSS", "XLORA", "POLY")


def read_config(section: Any, name: str) -> PeftConfig:
    """The peft config in `adapters` for component `name`, `dict(type=LoraConfig, r=16, ...)`, checked."""
    cls = resolve(section["type"]) if isinstance(section, Mapping) and "type" in section else section
    if not (isinstance(cls, type) and issubclass(cls, PeftConfig)):
        expected = "dict(type=LoraConfig, r=16, ...): a config class of peft"
        raise UserError(f"adapters.{name} got {section!r}; expected {expected}")
    try:
        config = cls(**{key: value for key, value in section.items() if key != "type"})
    except (TypeError, ValueError) as error:
        raise UserError(f"adapters.{name}: {one_line(error)}") from error
    unsupported = config.is_prompt_learning or config.is_adaption_prompt or config.peft_type in UNSUPPORTED
    message = f"adapters.{name}: {cls.__name__} cannot be trained here; use one such as LoraConfig or LoKrConfig"
    require(not unsupported, message)
    targets = getattr(config, "target_modules", True)
    require(bool(targets), f"adapters.{name} needs target_modules: which modules of the {name} get one")
    for option in UNSAVED_OPTIONS:
        message = f"adapters.{name}: {option} trains what is no adapter; use target_modules, or train it in full"
        require(not getattr(config, option, None), message)
    _check_ranks_and_patterns(section, name)
    for option in CODE_OPTIONS:
        message = f"adapters.{name}: {option} names a module that would be imported; leave it out"
        require(not getattr(config, option, None), message)
    bias = getattr(config, "bias", "none")
    require(bias in ("none", False), f"adapters.{name}: bias='{bias}' would change the base model; leave it out")
    return config


def _check_ranks_and_patterns(section: Mapping[str, Any], name: str) -> None:
    """Refuse ranks that take all memory, and patterns that take all time."""
    by_pattern = {key: section.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, values in by_pattern.items():
        require(isinstance(values, Mapping), f"adapters.{name}.{key} got {values!r}; expected numbers by pattern")
    for rank in (section.get("r", 1), *by_pattern["rank_pattern"].values()):
        fine = type(rank) is int and 0 <= rank <= LARGEST_RANK
        require(fine, f"adapters.{name} got the rank {rank!r}; expected at most {LARGEST_RANK:,}")
    patterns = [section[key] for key in PATTERNS if isinstance(section.get(key), str)]
    for pattern in (*patterns, *(key for values in by_pattern.values() for key in values)):
        slow = len(pattern) > 1000 or len(re.findall(r"[*+{]", pattern)) > 3 or re.search(r"\)[*+{]", pattern)
        message = f"adapters.{name} has the pattern {pattern[:80]!r}, which may match for ever; list names instead"
        require(not slow, message)


def inject(module: nn.Module, config: PeftConfig, name: str, seed: int) -> None:
    """Put an adapter into component `name`, with weights from `seed`; then only the adapter requires gradients."""
    _check_targets(module, config, name)
    base = {key: (value, torch.hash_tensor(value.detach())) for key, value in module.named_parameters()}
    try:
        with seeded(seed), _quiet():
            inject_adapter_in_model(config, module, adapter_name=NAME)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"adapters.{name}: {one_line(error)}") from error
    method = f"adapters.{name}: {type(config).__name__} with these options"
    for key, (value, before) in base.items():
        if value.requires_grad or torch.hash_tensor(value.detach()) != before:
            raise UserError(f"{method} changes the base model ({key}); choose another initialisation")
    require(any(value.requires_grad for value in module.parameters()), f"{method} has nothing to train")
    adapted = [key for key, layer in module.named_modules() if hasattr(layer, "base_layer")]
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option, None) or {}:
            matches = any(re.match(rf"(.*\.)?({pattern})$", key) for key in adapted)
            require(matches, f"adapters.{name}: {option} has '{pattern}', which matches no module with an adapter")


def _check_targets(module: nn.Module, config: PeftConfig, name: str) -> None:
    """Raise a UserError if any target matches no module; peft raises only if none match."""
    layers = {key: layer for key, layer in module.named_modules() if key}
    targets = getattr(config, "target_modules", None)
    for target in sorted(targets) if isinstance(targets, list | set | tuple) else []:  # a string is a pattern
        if not any(f".{key}".endswith(f".{target}") for key in layers):
            able = [key for key, layer in layers.items() if isinstance(layer, nn.Linear | nn.Conv2d)]
            names = dict.fromkeys(key.rpartition(".")[2] for key in able)
            known = [last for last in names if not last.isdigit()][:12]
            message = f"adapters.{name}: target_modules has '{target}', which no module of the {name} is called"
            raise UserError(f"{message}; it has {', '.join(known)}")


def config_of(module: nn.Module) -> PeftConfig | None:
    """The config of the adapter in a module; None if there is none."""
    configs = getattr(module, "peft_config", {})
    return configs.get(NAME) if isinstance(configs, Mapping) else None


def leaves_base_alone(module: nn.Module) -> bool:
    """Whether a module's adapter only adds to the outputs of its base layers, and never reads their weights."""
    method = getattr(config_of(module), "peft_type", None)
    return method in ("LORA", "LOKR", "LOHA") and not getattr(config_of(module), "use_dora", False)


def write(module: nn.Module, folder: Path) -> None:
    """Write a component's adapter: peft's two files, and diffusers' if it can load the method.

    diffusers' `load_lora_adapter` reads rank and strength from metadata under the prefix `transformer.`; from peft's
    file it loads nothing, or at the wrong strength, without an error.
    """
    config = config_of(module)
    assert config is not None
    folder.mkdir(parents=True)
    own = get_peft_model_state_dict(module, adapter_name=NAME, save_embedding_layers=False)
    state = {key: value.detach().cpu().contiguous().clone() for key, value in own.items()}
    save_file(_prefixed(state, "base_model.model"), folder / WEIGHTS, {"format": "pt"})
    options = {
        **{key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()},
        "inference_mode": True,
        "auto_mapping": {"base_model_class": type(module).__name__, "parent_library": type(module).__module__},
    }
    (folder / CONFIG).write_text(json.dumps(options, indent=2, sort_keys=True))
    if loads_in_diffusers(module):
        text = json.dumps(_prefixed(options, "transformer"), sort_keys=True)
        metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: text}
        save_file(_prefixed(state, "transformer"), folder / DIFFUSERS_WEIGHTS, metadata)


def _prefixed(items: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for key, value in items.items()}


def loads_in_diffusers(module: nn.Module) -> bool:
    """Whether `module.load_lora_adapter` takes an adapter of its method."""
    return isinstance(module, PeftAdapterMixin) and isinstance(config_of(module), LoraConfig | LoKrConfig)


def load_with_peft(base: nn.Module, folder: Path) -> PeftModel:
    """peft's model of an adapter folder on its base, as anyone would load it; `base` itself is changed."""
    with _quiet(), seeded(0):  # peft initialises weights before it reads them
        return PeftModel.from_pretrained(base, str(folder))


def load_with_diffusers(base: Any, folder: Path) -> None:
    """Load an adapter folder into its base by diffusers' loader."""
    with _quiet(), seeded(0):
        base.load_lora_adapter(str(folder), weight_name=DIFFUSERS_WEIGHTS)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings about unmatched keys, which `inject` reports itself, and about a deprecated attribute."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following .* keys did not match", RuntimeWarning)
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        yield


def merge(base: nn.Module, folder: Path) -> nn.Module:
    """The plain component that an adapter folder and its base add up to; `base` is changed."""
    loaded = load_with_peft(base, folder)
    try:
        merged = loaded.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError, TypeError) as error:
        method = type(config_of(base)).__name__
        raise UserError(f"{method} cannot be merged into its base ({one_line(error)}); do not merge") from error
    if config_of(merged) is not None:  # peft leaves it there
        del merged.peft_config
    return merged


def read_folder(folder: Path) -> dict[str, Any] | None:
    """The settings of an adapter folder; None for another folder. A UserError if they cannot be read."""
    path = folder / CONFIG
    return read_json(path) if os.path.lexists(path) else None


def put_on(module: nn.Module, folder: Path, name: str) -> None:
    """Load an adapter folder from anywhere into component `name`; `module` is changed.

    Raises:
        UserError: the adapter trains what is no adapter, names code or takes too long to match; or does not fit.
    """
    _check_folder(folder, name)
    stored = _shapes(folder)
    try:
        load_with_peft(module, folder)
        own = get_peft_model_state_dict(module, adapter_name=NAME, save_embedding_layers=False)
        loaded = {f"base_model.model.{key}": list(value.shape) for key, value in own.items()}
    except Exception as error:  # peft checks little of what it reads
        raise UserError(f"adapter '{folder}' does not fit {name} of the base: {one_line(error)[:300]}") from error
    differ = sorted(key for key in stored.keys() | loaded.keys() if stored.get(key) != loaded.get(key))
    message = f"adapter '{folder}' does not fit {name} of the base: {len(differ)} weights differ"
    require(not differ, f"{message}, first {min(differ, default='')}")


def _check_folder(folder: Path, name: str) -> None:
    """Judge an adapter's settings as those of a config are judged, before peft acts on them."""
    settings = read_folder(folder) or {}
    cls = next(
        (item for method, item in PEFT_TYPE_TO_CONFIG_MAPPING.items() if method == settings.get("peft_type")), None
    )
    file = folder / CONFIG
    if cls is None or settings["peft_type"] in UNSUPPORTED:
        raise UserError(f"'{file}' is of peft_type {settings.get('peft_type')!r}; expected one such as LORA or LOKR")
    known = {item.name for item in fields(cls)} - {"peft_type", "inference_mode"}
    section = {"type": f"peft.{cls.__name__}", **{key: settings[key] for key in settings.keys() & known}}
    problems = problems_of(section, f"'{file}'")
    require(not problems, "; ".join(problems[:3]))
    read_config(section, name)


def _shapes(folder: Path) -> dict[str, list[int]]:
    """The shapes of the weights in an adapter folder."""
    try:
        check_regular(folder / WEIGHTS)
        with safe_open(folder / WEIGHTS, "pt") as weights:
            return {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118 - no mapping
    except (OSError, MemoryError, SafetensorError) as error:
        raise UserError(f"'{folder / WEIGHTS}' cannot be read: {one_line(error)}; get the adapter again") from error
