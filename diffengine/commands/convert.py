"""Write a checkpoint's trained components in diffusers' form: OUT/transformer and so on.

`diffengine convert CONFIG CKPT OUT`; or `diffengine convert WORK_DIR` for a run's newest checkpoint, into
WORK_DIR itself, in the place of what an earlier conversion left there.
"""

import argparse
from pathlib import Path

from diffengine.errors import UserError

NO_OUT = "convert got CONFIG and CKPT but no OUT; expected CONFIG CKPT OUT"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="the config that was trained, or a run's work dir alone")
    parser.add_argument("checkpoint", nargs="?", help="a .pth file of the run")
    parser.add_argument("out", nargs="?", help="the folder to write to; of a work dir alone, that one")
    parser.add_argument(
        "--save-keys",
        nargs="+",
        action="extend",
        metavar="KEY",
        help="components to write; default all that was trained",
    )
    parser.add_argument(
        "--pipeline", action="store_true", help="write a whole folder for AmusedPipeline.from_pretrained"
    )
    parser.add_argument("--merge", action="store_true", help="write whole components, adapters added to their base")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of what is written (default fp32)"
    )
    parser.add_argument(
        "--ema", action="store_true", help="write the averaged weights of a run that kept them (EMAHook)"
    )


def run(options: argparse.Namespace) -> int:
    from diffengine import config
    from diffengine.engine import checkpoint
    from diffengine.engine.state import with_average
    from diffengine.export import DTYPES, export_components, export_pipeline, model_of, trusted_config
    from diffengine.models.loading import quiet_libraries
    from diffengine.registry import import_from_here

    quiet_libraries()
    if options.pipeline and options.save_keys:
        raise UserError("--pipeline writes every component; leave out --save-keys")
    if options.pipeline and options.merge:
        raise UserError("--pipeline merges adapters by itself; leave out --merge")
    words, keys = _words(options)
    given, path, out = _sources(words)
    state, source = checkpoint.read(path), f"checkpoint '{path}'"
    checkpoint.verify(path)
    if options.ema:
        state = with_average(state, source)
    if given:
        import_from_here()
    resolved = trusted_config(state, config.read(given) if given else None, source)
    model = model_of(state, resolved, source)
    if keys != options.save_keys and str(out) in model.exportable:
        raise UserError(NO_OUT)
    dtype = DTYPES[options.dtype]
    if options.pipeline:
        exported = [export_pipeline(model, out, dtype=dtype)]
    else:
        exported = export_components(model, out, keys, merge=options.merge, dtype=dtype)
    for item in exported:
        print("\n  ".join([f"wrote {item}; open it with", *item.lines]))
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


def _sources(words: list[str]) -> tuple[str | None, Path, Path]:
    """(config, checkpoint, out) of either form of the command."""
    from diffengine.engine import checkpoint

    if len(words) < 2:
        work_dir = Path(words[0] if words else "")
        if not words or not work_dir.is_dir():
            lost = "" if work_dir.exists() else ", which does not exist"
            got = f"only '{work_dir}'{lost}" if words else "nothing to convert"
            raise UserError(f"convert got {got}; expected CONFIG CKPT OUT, or the work dir of a run")
        newest = checkpoint.newest(work_dir)
        if newest is None:
            raise UserError(f"work dir '{work_dir}' holds no checkpoint")
        return None, newest, work_dir
    if len(words) < 3:
        raise UserError(NO_OUT)
    return words[0], Path(words[1]), Path(words[2])
