"""Loading one component from a folder or a hub name, with errors for the person who named it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from diffengine.errors import UserError


def quiet_libraries() -> None:
    """Leave the console to the run: errors of diffusers and transformers only, no bars for local files.

    (The hub's own bar, for a download, stays.)
    """
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_component(origin: str, name: str, load: Callable[..., Any], **options: Any) -> Any:
    """`load` (a `from_pretrained` or `load_config`) on component `name` of `origin`; "" for a whole pipeline.

    Args:
        origin: a pipeline folder with a subfolder `name`, the component's own folder, or a hub name.

    Raises:
        UserError: no such folder, nothing of that name in it, a broken file, or a hub that cannot be reached.
    """
    folder = Path(origin).expanduser()
    if folder.is_dir():
        inside = folder / name if name and (folder / name).is_dir() else folder
        if name and inside == folder and not list(folder.glob("*config.json")):
            raise UserError(f"model folder '{origin}' holds no folder '{name}'; it has {_listing(folder)}")
        where: dict[str, Any] = {"pretrained_model_name_or_path": str(inside)}
    elif origin.startswith((".", "/", "~")) or origin.count("/") != 1:
        raise UserError(
            f"model folder '{origin}' does not exist; give a folder that save_pretrained wrote, or a hub name such "
            "as amused/amused-512"
        )
    else:
        where = {"pretrained_model_name_or_path": origin, **({"subfolder": name} if name else {})}
    try:
        return load(**where, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"cannot load {name or 'a pipeline'} of '{origin}': {lines[0] if lines else type(error).__name__}") from error


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:6]) or "nothing"
