"""Write a checkpoint's trained components in diffusers' format: OUT/transformer and so on.

`diffengine convert CONFIG CKPT OUT`; or `diffengine convert WORK_DIR` for a run's newest checkpoint, into WORK_DIR
itself, replacing what an earlier conversion wrote there.
"""

import argparse
from pathlib import Path

from diffengine.errors import UserError, require
from diffengine.terminal import say

NO_OUT = "convert got CONFIG and CKPT but no OUT; expected CONFIG CKPT OUT"


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", nargs="?", help="the config that was trained, or a run's work dir alone")
    add("checkpoint", nargs="?", help="a .pth file of the run")
    add("out", nargs="?", help="the folder to write to; for a work dir alone, that one")
    keys = "components to write; default all that was trained"
    add("--save-keys", nargs="+", action="extend", metavar="KEY", help=keys)
    add("--pipeline", action="store_true", help="write a whole folder for AmusedPipeline.from_pretrained")
    add("--merge", action="store_true", help="write whole components, adapters merged into their base")
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of what is written (default fp32)")
    add("--best", action="store_true", help="of a work dir: the checkpoint with the lowest held-out loss, best.pth")
    add("--ema", action="store_true", help="write the averaged weights of a run that kept them (EMAHook)")


def run(options: argparse.Namespace) -> int:
    from diffengine import config
    from diffengine.engine.state import load_model
    from diffengine.export import export
    from diffengine.models.loading import quiet_libraries
    from diffengine.registry import import_from_here

    quiet_libraries()
    words, keys = _words(options)
    given, path, out = _sources(words, options.best)
    if given:
        import_from_here()
    model = load_model(path, config.read(given) if given else None, options.ema)
    require(keys == options.save_keys or str(out) not in model.exportable, NO_OUT)
    for item in export(model, out, keys, pipeline=options.pipeline, merge=options.merge, dtype=options.dtype):
        say(f"wrote {item}; open it with", *(f"  {line}" for line in item.lines))
    return 0


def _words(options: argparse.Namespace) -> tuple[list[str], list[str] | None]:
    """CONFIG CKPT OUT or WORK_DIR, and the keys: --save-keys before any of these has taken them as well."""
    words = [word for word in (options.config, options.checkpoint, options.out) if word is not None]
    keys = options.save_keys
    if keys is None:
        return words, None
    by_checkpoint = len(words) > 1 or any(word.endswith(".pth") for word in [*words, *keys])
    missing = (3 if by_checkpoint else 1) - len(words)
    end = max(1, len(keys) - missing)
    return [*words, *keys[end:]], keys[:end]


def _sources(words: list[str], best: bool) -> tuple[str | None, Path, Path]:
    """(config, checkpoint, out) of CONFIG CKPT OUT or WORK_DIR."""
    from diffengine.engine import checkpoint

    if len(words) > 1:
        require(len(words) > 2, NO_OUT)
        require(not best, "--best is for a work dir; CONFIG CKPT OUT names its checkpoint")
        return words[0], Path(words[1]), Path(words[2])
    work_dir = Path(words[0] if words else "")
    absent = "" if work_dir.exists() else ", which does not exist"
    got = f"only '{work_dir}'{absent}" if words else "nothing to convert"
    require(bool(words) and work_dir.is_dir(), f"convert got {got}; expected CONFIG CKPT OUT, or the work dir of a run")
    newest = checkpoint.newest(work_dir)
    if best:
        newest = work_dir / checkpoint.BEST
        require(newest.exists(), f"work dir '{work_dir}' holds no {newest.name}: its run did not validate")
        say(f"{newest.name} is of step {checkpoint.steps(newest)}")
    if newest is None:
        raise UserError(f"work dir '{work_dir}' holds no checkpoint")
    return None, newest, work_dir
