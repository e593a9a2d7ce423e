"""Loading one component from a folder or a hub name, with errors for the person who named it."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffengine.errors import UserError, require
from diffengine.files import expanded, read_json
from diffengine.signatures import sizes_out_of_range
from diffengine.text import did_you_mean, one_line


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
        check_files(folder)
    try:
        return load(str(folder or origin), **options)
    except UserError:
        raise
    except Exception as error:
        reason, *_ = one_line(error).split("\n")
        cls = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise UserError(f"cannot load {name or 'a pipeline'} of '{origin}': {cls}{reason}") from error


def check_files(folder: Path) -> None:
    """Refuse pipes and devices, which would be waited for, and sizes that no memory holds."""
    for path in folder.iterdir():
        require(path.is_file() or path.is_dir(), f"'{path}' is neither a file nor a folder; remove it")
    if (config := folder / "config.json").is_file():
        check_sizes(f"'{config}'", read_json(config))


def check_sizes(name: str, sizes: Mapping[str, Any]) -> None:
    """Refuse sizes of a model by which no memory could hold it; they are of the config `name`."""
    problems = sizes_out_of_range(name, sizes)
    require(not problems, "; ".join(problems))


def load_module(origin: str, name: str, cls: Any) -> Any:
    """Load a module in fp32; a UserError if weights are missing, which the libraries only warn of and initialise."""
    precision = "dtype" if cls.__module__.startswith("transformers.") else "torch_dtype"
    options = {precision: torch.float32, "output_loading_info": True}
    with torch.random.fork_rng(devices=[]):
        module, info = load_component(origin, name, cls.from_pretrained, **options)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name} of '{origin}' lacks {len(missing)} weights of a {cls.__name__}, first {missing[0]}")
    return module


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
