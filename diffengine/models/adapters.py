"""Adapters of peft on a component: a few trained weights beside a base that stays as it is.

They are injected into the component itself, so that its class, its name and a pipeline over it are the same.
"""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoKrConfig, LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from diffengine.errors import UserError
from diffengine.models.loading import seeded
from diffengine.registry import resolve

CONFIG, WEIGHTS, DIFFUSERS_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", LORA_WEIGHT_NAME_SAFE
NAME = "default"  # peft's own

# Options that train or change other weights than the adapter's, which diffusers' loader does not know.
LOST = ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters")
# Methods that need calls of their own during training.
NEED_MORE = ("ADALORA", "ADAMSS", "XLORA", "POLY")


def read_config(part: Any, name: str) -> PeftConfig:
    """The peft config that `adapters` has for component `name`: `dict(type=LoraConfig, r=16, ...)`.

    Raises:
        UserError: it is none, or one that cannot be trained, saved and loaded in full.
    """
    kind = resolve(part["type"]) if isinstance(part, Mapping) and "type" in part else part
    if not (isinstance(kind, type) and issubclass(kind, PeftConfig)):
        raise UserError(
            f"adapters.{name} got {part!r}; expected dict(type=LoraConfig, r=16, ...): a config class of peft"
        )
    try:
        config = kind(**{key: value for key, value in part.items() if key != "type"})
    except (TypeError, ValueError) as error:
        raise UserError(f"adapters.{name}: {_line(error)}") from error
    if config.is_prompt_learning or config.is_adaption_prompt or config.peft_type in NEED_MORE:
        raise UserError(
            f"adapters.{name}: {kind.__name__} cannot be trained here; expected one that is injected into "
            "modules and trained like any weight, such as LoraConfig, LoKrConfig or LoHaConfig"
        )
    if hasattr(config, "target_modules") and not config.target_modules:
        raise UserError(f"adapters.{name} needs target_modules: which modules of the {name} get one")
    for option in LOST:
        if getattr(config, option, None):
            raise UserError(
                f"adapters.{name}: {option} trains what is no adapter and would be lost in diffusers; use "
                "target_modules, or train the component in full"
            )
    if (bias := getattr(config, "bias", "none")) not in ("none", False):
        raise UserError(
            f"adapters.{name}: bias='{bias}' would change the base model, which stays as it is; leave it out"
        )
    return config


def inject(module: nn.Module, config: PeftConfig, name: str, seed: int) -> None:
    """Put an adapter into component `name`, in place; from here on only the adapter requires gradients.

    Args:
        seed: of its first weights; the global random state is left alone.

    Raises:
        UserError: a target that is not there, or a method that changes the base.
    """
    modules = [key for key, _ in module.named_modules() if key]
    if unmatched := [target for target in _list(config, "target_modules") if not _matches(target, modules)]:
        raise UserError(
            f"adapters.{name}: target_modules has '{unmatched[0]}', which no module of the {name} is called; "
            f"it has {', '.join(_linear(module))}"
        )
    base = {key: (value, torch.hash_tensor(value.detach())) for key, value in module.named_parameters()}
    try:
        with seeded(seed), _quiet():
            inject_adapter_in_model(config, module, adapter_name=NAME)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"adapters.{name}: {_line(error)}") from error
    own = [value for value in module.parameters() if value.requires_grad]
    kept = {id(value) for value, _ in base.values()}
    changed = [key for key, (value, print_) in base.items() if torch.hash_tensor(value.detach()) != print_]
    if changed or any(id(value) in kept for value in own):
        raise UserError(
            f"adapters.{name}: {type(config).__name__} with these options changes the base model"
            f"{f' ({changed[0]})' if changed else ''}, which stays as it is; choose another initialisation"
        )
    if not own:
        raise UserError(f"adapters.{name}: {type(config).__name__} with these options has nothing to train")
    targets = [key for key, layer in module.named_modules() if hasattr(layer, "base_layer")]
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option, None) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", target) for target in targets):
                raise UserError(f"adapters.{name}: {option} has '{pattern}', which matches no module with an adapter")


def config_of(module: nn.Module) -> PeftConfig | None:
    """The config of the adapter in a module; None where there is none."""
    configs = getattr(module, "peft_config", {})
    return configs.get(NAME) if isinstance(configs, Mapping) else None


def uses_base_as_it_is(module: nn.Module) -> bool:
    """Whether a module's adapter adds to what its base layers give, and reads their weights no further."""
    config = config_of(module)
    adds = {"LORA", "LOKR", "LOHA"}
    return config is not None and config.peft_type in adds and not getattr(config, "use_dora", False)


# ------------------------------------------------------------------------------------------ files


def write(module: nn.Module, name: str, folder: Path) -> None:
    """Write the adapter of component `name`: peft's two files, and diffusers' where it can load the method.

    diffusers' `load_lora_adapter` takes rank and strength from metadata under the prefix `transformer.`; from
    peft's own file it loads nothing, or at the wrong strength, with no error.
    """
    config = config_of(module)
    assert config is not None
    folder.mkdir(parents=True)
    own = get_peft_model_state_dict(module, adapter_name=NAME, save_embedding_layers=False)
    state = {key: value.detach().cpu().contiguous().clone() for key, value in own.items()}
    save_file(_prefixed(state, "base_model.model"), folder / WEIGHTS, {"format": "pt"})
    kind = {"base_model_class": type(module).__name__, "parent_library": type(module).__module__}
    options = {key: _plain(value) for key, value in config.to_dict().items()}
    options |= {"inference_mode": True, "auto_mapping": kind}
    (folder / CONFIG).write_text(json.dumps(options, indent=2, sort_keys=True))
    if loads_in_diffusers(module):
        spelt = json.dumps(_prefixed(options, "transformer"), sort_keys=True)
        metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: spelt}
        save_file(_prefixed(state, "transformer"), folder / DIFFUSERS_WEIGHTS, metadata)


def loads_in_diffusers(module: nn.Module) -> bool:
    """Whether `module.load_lora_adapter` takes an adapter of its method."""
    return isinstance(module, PeftAdapterMixin) and isinstance(config_of(module), LoraConfig | LoKrConfig)


def load_with_peft(base: nn.Module, folder: Path) -> PeftModel:
    """peft's model of an adapter folder on its base, as anyone would load it; `base` itself is changed."""
    with _quiet(), seeded(0):  # peft draws weights before it reads them
        return PeftModel.from_pretrained(base, str(folder))


def load_with_diffusers(base: Any, folder: Path) -> None:
    """The same by diffusers' loader."""
    with _quiet(), seeded(0):
        base.load_lora_adapter(str(folder), weight_name=DIFFUSERS_WEIGHTS)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a warning of what `inject` refuses, and of a name that peft 0.21 asks transformers 5 for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following .* keys did not match", RuntimeWarning)
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        yield


def merge(base: nn.Module, folder: Path) -> nn.Module:
    """The plain component that an adapter folder and its base add up to; `base` is changed.

    Raises:
        UserError: a method that cannot be merged.
    """
    loaded = load_with_peft(base, folder)
    try:
        merged = loaded.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError, TypeError) as error:
        kind = type(config_of(base)).__name__
        raise UserError(f"{kind} cannot be merged into its base ({_line(error)}); leave out the merging") from error
    if config_of(merged) is not None:  # peft leaves it behind
        del merged.peft_config
    return merged


def read_folder(folder: Path) -> dict[str, Any] | None:
    """The settings of an adapter folder; None where it is none.

    Raises:
        UserError: they cannot be read.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{path}': {_line(error)}") from error
    if not isinstance(settings, dict):
        raise UserError(f"'{path}' holds no settings of an adapter")
    return settings


# ------------------------------------------------------------------------------------------ words


def _prefixed(items: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for key, value in items.items()}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else value


def _list(config: PeftConfig, option: str) -> list[str]:
    """An option's names; none where it is a pattern or one of peft's words."""
    value = getattr(config, option, None)
    return [] if value is None or isinstance(value, str) else sorted(value)


def _matches(target: str, modules: Iterable[str]) -> bool:
    return any(key == target or key.endswith(f".{target}") for key in modules)


def _linear(module: nn.Module) -> list[str]:
    """The names that layers of a component end in: to_q, to_k, ..."""
    kinds = (nn.Linear, nn.Conv2d)
    names = (key.rpartition(".")[2] for key, layer in module.named_modules() if isinstance(layer, kinds))
    return [name for name in dict.fromkeys(names) if not name.isdigit()][:12]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def tensors_of(module: nn.Module) -> list[Tensor]:
    """What of a component is written: its adapter's tensors, or, without an adapter, all."""
    if config_of(module) is None:
        return [*module.parameters(), *module.buffers()]
    return [value for value in module.parameters() if value.requires_grad]
