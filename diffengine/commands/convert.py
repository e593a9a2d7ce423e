"""Write a checkpoint's trained components in diffusers' form: OUT/transformer and so on.

`diffengine convert CONFIG CKPT OUT`, or `diffengine convert WORK_DIR` for a run's newest checkpoint.
"""

import argparse
from pathlib import Path

from diffengine.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the config that was trained, or a run's work dir alone")
    parser.add_argument("checkpoint", nargs="?", help="a .pth file of the run")
    parser.add_argument("out", nargs="?", help="the folder to write to")
    parser.add_argument(
        "--save-keys", nargs="+", metavar="KEY", help="components to write; default all that was trained"
    )
    parser.add_argument(
        "--pipeline", action="store_true", help="write a whole folder for AmusedPipeline.from_pretrained"
    )


def run(options: argparse.Namespace) -> int:
    from diffengine import config
    from diffengine.engine import checkpoint
    from diffengine.export import export_components, export_pipeline, model_of, trusted_config
    from diffengine.models.loading import quiet_libraries

    quiet_libraries()
    if options.pipeline and options.save_keys:
        raise UserError("--pipeline writes every component; leave out --save-keys")
    given, path, out = _sources(options)
    state, source = checkpoint.read(path), f"checkpoint '{path}'"
    settings = trusted_config(state, config.read(given) if given else None, source)
    model = model_of(state, config.resolve(settings), source)
    if options.pipeline:
        print(f"wrote {export_pipeline(model, out)}, checked tensor by tensor; open it with")
        print(f"  AmusedPipeline.from_pretrained({str(out)!r})")
        return 0
    for folder in export_components(model, out, options.save_keys):
        kind = type(model.exportable[folder.name]).__name__
        print(f"wrote {folder}, checked tensor by tensor; open it with")
        print(f"  {kind}.from_pretrained({str(out)!r}, subfolder={folder.name!r})")
    return 0


def _sources(options: argparse.Namespace) -> tuple[str | None, Path, Path]:
    """(config, checkpoint, out) of either form of the command."""
    from diffengine.engine import checkpoint

    if options.checkpoint is None:
        work_dir = Path(options.config)
        if not work_dir.is_dir():
            raise UserError(
                f"convert got only '{options.config}'; expected CONFIG CKPT OUT, or the work dir of a run"
            )
        newest = checkpoint.newest(work_dir)
        if newest is None:
            raise UserError(f"work dir '{work_dir}' holds no checkpoint")
        return None, newest, work_dir
    if options.out is None:
        raise UserError("convert got CONFIG and CKPT but no OUT; expected CONFIG CKPT OUT")
    return options.config, Path(options.checkpoint), Path(options.out)
