"""Loading one component from a folder or a hub name, with errors for the person who named it."""

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from diffengine.errors import UserError, require
from diffengine.files import check_regular, expanded, read_json
from diffengine.text import did_you_mean, format_bytes

LAYERS = re.compile("layers|blocks")  # in the name of a number of layers


def quiet_libraries() -> None:
    """Let diffusers and transformers print errors only, and no progress bars except for the hub's downloads."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def component_folder(origin: str, name: str) -> Path | None:
    """The folder of component `name` in a local `origin`: its subfolder, else `origin` itself; None on the hub."""
    folder = expanded(origin)
    if not folder.is_dir():
        return None
    return folder / name if name and (folder / name).is_dir() else folder


def load_component(origin: str, name: str, load: Callable[..., Any], **options: Any) -> Any:
    """Call `load` (a `from_pretrained` or `load_config`) on component `name` of `origin`.

    Args:
        origin: a pipeline folder with a subfolder `name`, the component's own folder, or a hub name.
        name: "" for a whole pipeline.

    Raises:
        UserError: the folder does not exist or lacks the component, a file is broken, or the hub cannot be reached.
    """
    folder = component_folder(origin, name)
    if folder is None:
        local = origin.startswith((".", "/", "~")) or origin.count("/") != 1 or origin.endswith(".pth")
        expected = "a folder that save_pretrained wrote, or a hub name such as amused/amused-512"
        require(not local, f"model folder '{origin}' does not exist; give {expected}")
        options |= {"subfolder": name} if name else {}
    elif name and folder.name != name and not list(folder.glob("*config.json")):
        listing = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise UserError(f"model folder '{origin}' holds no folder '{name}'; it has {listing}")
    if folder is not None:
        _check_files(folder)
    try:
        return load(str(folder or origin), **options)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the libraries check little of what they read; a panic in Rust is no Exception
        reason, *_ = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"cannot load {name or 'a pipeline'} of '{origin}': {reason}") from error


def _check_files(folder: Path) -> None:
    """Refuse a component's folder with a FIFO, a device, or JSON that is no object or names files in other folders."""
    for file in sorted(folder.iterdir()):
        if file.suffix == ".json":
            shards = read_json(file).get("weight_map", {})
            inside = isinstance(shards, dict) and all(Path(str(name)).name == name for name in shards.values())
            require(inside, f"'{file}' names weights that are not in its folder; get the model again")
        elif file.exists() and not file.is_dir():
            try:
                check_regular(file)
            except OSError as error:
                raise UserError(f"'{file}' cannot be read: {error.strerror}; get the model again") from error


def load_module(origin: str, name: str, cls: Any) -> Any:
    """Load a module in fp32 from safetensors alone.

    Raises:
        UserError: as of `load_component`; or the weights are not exactly those of the config, which the libraries only
            warn of, and initialise the rest.
    """
    precision = "dtype" if cls.__module__.startswith("transformers.") else "torch_dtype"
    options = {precision: torch.float32, "output_loading_info": True, "use_safetensors": True}

    def load(source: str, **options: Any) -> Any:
        if Path(source).is_dir():
            _check_size(Path(source), cls)
        return cls.from_pretrained(source, **options)

    with torch.random.fork_rng(devices=[]):
        module, info = load_component(origin, name, load, **options)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name} of '{origin}' lacks {len(missing)} weights of a {cls.__name__}, first {missing[0]}")
    # Older versions of transformers saved these numbers 0, 1, 2, ...
    others = sorted(str(key) for key in info["unexpected_keys"] if not key.endswith("position_ids"))
    others += sorted(map(str, info["mismatched_keys"]))
    message = (
        f"{name} of '{origin}' has {len(others)} weights that its config.json has not, first {min(others, default='')}"
    )
    require(not others, f"{message}; get the model again")
    return module


def _check_size(folder: Path, cls: Any) -> None:
    """Refuse a config of more layers or parameters than the folder has weights, before they take memory."""
    files = sorted(folder.glob("*.safetensors"))
    require(bool(files), f"'{folder}' holds no weights in safetensors; other formats may run code, so convert them")
    tensors = 0
    for file in files:
        with safe_open(file, "pt") as weights:
            tensors += len(weights.keys())
    for key, value in read_json(folder / "config.json").items():
        count = len(value) if isinstance(value, list) else value if LAYERS.search(key) else 0
        few = not isinstance(count, int | float) or count <= tensors
        require(few, f"'{folder}' has {key}={count} in its config.json, and {tensors} weights; get the model again")
    with torch.device("meta"):
        if hasattr(cls, "load_config"):  # of diffusers
            module = cls.from_config(cls.load_config(folder))
        else:
            module = cls(cls.config_class.from_pretrained(folder))
    parameters, size = sum(item.numel() for item in module.parameters()), sum(file.stat().st_size for file in files)
    has = f"'{folder}' has a config.json of {parameters:,} parameters, and {format_bytes(size)} of weights"
    require(parameters <= size, f"{has}; get the model again")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initialise weights on the host from this seed; the global random state is left alone, the GPUs' too."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would re-seed the GPUs
        yield


def digest(module: nn.Module | None, config: Mapping[str, Any]) -> str:
    """A digest of what a component computes: its sizes and every byte of its weights, not where it was saved."""
    ignored = ("architectures", "dtype", "transformers_version")
    sizes = {key: value for key, value in config.items() if not key.startswith("_") and key not in ignored}
    found = hashlib.blake2b(json.dumps(sizes, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in sorted(module.state_dict().items()) if module else ():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def unknown_sizes(name: str, sizes: Iterable[str], cls: Any) -> list[str]:
    """A message for each size that `cls` does not have; diffusers and transformers ignore it."""
    config = getattr(cls, "config_class", None) or cls  # of transformers, whose models take a config
    known = [key for key in inspect.signature(config).parameters if key != "kwargs"]
    return [f"{name} has no size '{key}'{did_you_mean(key, known)}" for key in sizes if key not in known]
