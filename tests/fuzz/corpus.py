"""Foreign inputs by door: each makes its files in the current folder and returns the command line that meets them.

The current folder has `toy.py`, `photos`, `model`, `run` and `tokens` (see `prepare`); a case may replace any of them.
None of the inputs may end in a traceback: `main(argv)` returns 0, or 2 with one line on stderr.
"""

import copy
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffengine.cli import main
from tests.support.models import make_model_folder, text_config, transformer_config
from tests.support.photos import write_photo_folder

Case = Callable[[], list[str]]

TOY = """
extends = "amused_512_own_lora"
resolution = 32
data = "photos"
pretrained = "model"
batch_size = 2
num_workers = 0
prompts = []
max_iters = 1
preview_every = None
validation_every = 0
custom_hooks = [dict(type=EMAHook)]
default_hooks = dict(report=None)
"""
DEEP = "[" * 100_000
CACHED = ("--cfg-options", "cache=True", "cache_path=tokens", "image_variations=1")


def prepare(root: Path) -> None:
    """Write a toy model, four photos, a config, and a run of one step."""
    make_model_folder(root / "model", "toy")
    write_photo_folder(root / "photos", 4, 48)
    text = "from diffengine.engine.hooks import EMAHook\n" + TOY
    (root / "toy.py").write_text(text, encoding="utf-8")
    assert main(["train", "toy.py", "--work-dir", "run", *CACHED]) == 0
    assert main(["convert", "run"]) == 0


def train(*argv: str) -> list[str]:
    return ["train", "toy.py", "--work-dir", "new", *argv]


def own(name: str) -> Path:
    """A copy in the current folder of what a link there leads to."""
    path = Path(name)
    if path.is_symlink():
        source = path.resolve()
        path.unlink()
        (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
    return path


# ---------------------------------------------------------------------------------------------- config files

ANYTHING: dict[str, Any] = {
    "text": "x", "number as text": "1e-4", "list": [1e-4], "dict": {"a": 1}, "none": None, "negative": -1, "zero": 0,
    "large": 10**18, "huge": 2**64, "float": 1e308, "true": True,
}  # fmt: skip

FILES = {
    "raises": "raise ValueError('no')",
    "raises BaseException": "raise BaseException('no')",
    "raises GeneratorExit": "raise GeneratorExit",
    "exits": "raise SystemExit(3)",
    "exits in a call": "exit()",
    "calls itself": "def f(): f()\nf()",
    "extends itself": "extends = 'mine.py'",
    "extends a number": "extends = 5",
    "extends a dict": "extends = {}",
    "extends nothing": "extends = ''",
    "extends a folder": "extends = './photos'",
    "extends NUL": "extends = 'a\\0.py'",
    "extends a long name": "extends = 'a' * 5000 + '.py'",
    "syntax error": "a = = 1",
    "NUL": b"a = 1\0",
    "not UTF-8": b"a = '\xff'",
    "UTF-16": "extends = 'toy.py'".encode("utf-16"),
    "empty": "",
    "deep expression": f"a = {DEEP}",
    "deep value": "extends = 'toy.py'\na = []\nfor _ in range(100000): a = [a]\ndata = a",
    "holds itself": "extends = 'toy.py'\na = []\na.append(a)\ndata = a",
    "dict holds itself": "extends = 'toy.py'\nmodel = {}\nmodel['a'] = model",
    "surrogates": "extends = 'toy.py'\ndata = '\\ud800'",
    "NUL in data": "extends = 'toy.py'\ndata = 'a\\0b'",
    "bad repr": "class A:\n  def __repr__(self): raise ValueError\nextends = 'toy.py'\ndata = A()",
    "bad error": "class E(Exception):\n  def __str__(self): raise ValueError\nraise E",
    "star import": "from os import *",
    "number keys": "extends = 'toy.py'\nmodel = {1: 2}",
    "type is a dict": "extends = 'toy.py'\nmodel = dict(type={})",
    "type is empty": "extends = 'toy.py'\nmodel = dict(type='')",
    "type is relative": "extends = 'toy.py'\nmodel = dict(type='..a.b')",
    "type is a module": "extends = 'toy.py'\nmodel = dict(type='os.path')",
    "type is a function": "extends = 'toy.py'\ncustom_hooks = [dict(type='os.getcwd')]",
    "type has NUL": "extends = 'toy.py'\ncustom_hooks = [dict(type='a\\0.b')]",
    "type has surrogates": "extends = 'toy.py'\ncustom_hooks = [dict(type='\\ud800.b')]",
    "section is a list": "extends = 'toy.py'\nmodel = []",
    "section is a text": "extends = 'toy.py'\ntrain_dataloader = 'x'",
    "hooks are a dict": "extends = 'toy.py'\ncustom_hooks = {}",
    "hooks are a number": "extends = 'toy.py'\ndefault_hooks = 5",
    "endless reference": "extends = 'toy.py'\ndata = '${data}'",
    "reference doubles": "extends = 'toy.py'\n"
    + "\n".join(f"a{i} = '${{a{i + 1}}}${{a{i + 1}}}'" for i in range(40))
    + "\na40 = 'x'\ndata = '${a0}'",
    "own module raises": "from broken import Thing\nextends = 'toy.py'\ncustom_hooks = [dict(type=Thing)]",
}

SETTINGS = (
    "learning_rate", "weight_decay", "batch_size", "micro_batch_size", "max_iters", "max_epochs", "warmup_iters",
    "seed", "num_workers", "resolution", "image_variations", "prompts", "preview_every", "log_every",
    "checkpoint_every", "keep_checkpoints", "caption_dropout", "flip", "data", "pretrained", "cache", "cache_path",
    "work_dir", "compile", "precision", "lr_schedule", "validation_every", "validation_share", "clip_grad",
    "shuffle_tags", "drop_tags", "keep_tags", "tag_separator", "caption_variations",
)  # fmt: skip
SECTION_KEYS = (
    "model.adapters.transformer.r", "model.adapters.transformer.lora_alpha", "model.adapters.transformer.lora_dropout",
    "model.adapters.transformer.target_modules", "model.train", "model.label_smoothing", "model.vq_batch_size",
    "optim_wrapper.optimizer.betas", "optim_wrapper.optimizer.eps", "train_dataloader.transforms",
    "train_dataloader.image_transforms", "train_dataloader.dataset", "default_hooks.preview.options",
    "default_hooks.preview.prompts", "custom_hooks", "vis_backends", "token_cache",
)  # fmt: skip
OPTIONS = (
    "a.b.c=1", "=", "x==y", "seed==1", "data=", "model=", "model.=1", ".=1", "..=1", ".a=1", "model..type=1",
    "custom_hooks.0=1", "custom_hooks.-1.x=1", "custom_hooks.99999999999999999999.x=1", "custom_hooks.²=1",
    "custom_hooks.0.type=1", "train_dataloader.image_transforms.x=1", "train_dataloader.image_transforms.-99=1",
    "train_dataloader.image_transforms.0.size=1_0", "seed=" + "9" * 5000, "seed=0x" + "f" * 5000, "seed=1e400",
    "seed=" + DEEP, "seed=" + "-" * 100_000 + "1", "seed=" + "(" * 90 + ")" * 90, "seed={1: 2}", "seed={}", "seed=...",
    "seed=b'x'", "seed={1,2}", "seed=1j", "seed='\\ud800'", "\ud800=1", "data=\ud800", "data=\0", "\0=1",
    "work_dir=\0", "work_dir=\ud800", "model.type=os.system", "model.type=\0", "model.pretrained=" + "a/" * 3000,
    "learning_rate=nan", "learning_rate=inf", "learning_rate=1e400", "learning_rate=-inf", "model.adapters=None",
    "optim_wrapper.optimizer.lr=nan", "optim_wrapper.optimizer.type=os.getcwd", "resolution=\x1b[31m",
)  # fmt: skip


def config_file(content: str | bytes) -> Case:
    def make() -> list[str]:
        Path("mine.py").write_bytes(content.encode() if isinstance(content, str) else content)
        Path("broken.py").write_text("raise RuntimeError('module')")
        return ["train", "mine.py", "--work-dir", "new"]

    return make


def setting(key: str, value: Any) -> Case:
    """A value at a setting or, with dots, in a section, written in a config file."""
    *parents, last = key.split(".")
    found: Any = {last: value}
    for name in reversed(parents):
        found = {name: found}
    ((name, value),) = found.items()
    return config_file(f"extends = 'toy.py'\n{name} = {value!r}\n".replace(": inf", ": float('inf')"))


def option(text: str) -> Case:
    return lambda: train("--cfg-options", text)


def as_config(make_it: Callable[[Path], object], name: str = "odd.py") -> Case:
    def make() -> list[str]:
        make_it(Path(name))
        return ["train", name, "--work-dir", "new"]

    return make


CONFIG: dict[str, Case] = {
    **{f"file {name}": config_file(content) for name, content in FILES.items()},
    **{f"{key} {name}": setting(key, value) for key in (*SETTINGS, *SECTION_KEYS) for name, value in ANYTHING.items()
       if (key, name) != ("compile", "true")},  # takes a while
    **{f"option {text[:30]!r}": option(text) for text in OPTIONS},
    "a FIFO": as_config(os.mkfifo),
    "a folder": as_config(Path.mkdir),
    "a device": as_config(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": as_config(lambda path: path.symlink_to(path.name)),
    "a NUL in its name": lambda: ["train", "a\0.py"],
    "a surrogate in its name": lambda: ["train", "\ud800.py"],
    "a long name": lambda: ["train", "a" * 300 + ".py"],
    "a longer name": lambda: ["train", "a/" * 5000 + "a.py"],
    "an escape in its name": lambda: ["train", "\x1b[31m.py"],
    "a name of a user that is not": lambda: ["train", "~nobody-here/a.py"],
}  # fmt: skip

# ---------------------------------------------------------------------------------------------- command line

NAMES = {"NUL": "a\0b", "a surrogate": "\ud800", "an escape": "\x1b]0;x\x07", "300 letters": "a" * 300,
         "10,000 letters": "a/" * 5000, "nothing": "", "a tilde": "~nobody-here/x", "a newline": "a\nb",
         "a lone byte": os.fsdecode(b"\xff\xfe")}  # fmt: skip
PATHS: dict[str, Callable[[str], list[str]]] = {
    "data": lambda name: train("--data", name),
    "pretrained": lambda name: train("--pretrained", name),
    "work dir": lambda name: ["train", "toy.py", "--work-dir", name],
    "resume": lambda name: train("--resume", name),
    "init from": lambda name: train("--init-from", name),
    "convert a work dir": lambda name: ["convert", name],
    "convert a config": lambda name: ["convert", name, "run/iter_1.pth", "out"],
    "convert a checkpoint": lambda name: ["convert", "toy.py", name, "out"],
    "convert to": lambda name: ["convert", "toy.py", "run/iter_1.pth", name],
    "convert keys": lambda name: ["convert", "toy.py", "run/iter_1.pth", "out", "--save-keys", name],
    "sample": lambda name: ["sample", name, "a cat"],
    "sample a prompt": lambda name: ["sample", "model", name, "--steps", "1"],
    "sample a base": lambda name: ["sample", "run", "a cat", "--base", name],
    "sample prompts": lambda name: ["sample", "model", "--prompts", name],
    "sample an image": lambda name: ["sample", "model", "a cat", "--image", name],
    "sample to a PNG": lambda name: ["sample", "model", "a cat", "--steps", "1", "-o", name + ".png"],
    "sample to": lambda name: ["sample", "model", "a cat", "--steps", "1", "-o", name],
    "eval": lambda name: ["eval", name],
    "eval data": lambda name: ["eval", "model", "--data", name],
    "eval split": lambda name: ["eval", "model", "--data", "photos", "--split", name],
    "eval prompts": lambda name: ["eval", "model", "--prompts", name],
    "eval clip": lambda name: ["eval", "model", "--data", "photos", "--max-images", "1", "--steps", "1", "--clip",
                               name],
    "report": lambda name: ["report", name],
    "list": lambda name: ["list-cfg", name],
    "copy": lambda name: ["copy-cfg", name, "x.py"],
    "copy to": lambda name: ["copy-cfg", "vq_32_emoji", name + ".py"],
    "a command": lambda name: [name],
    "a flag": lambda name: ["train", "toy.py", "--" + name],
}  # fmt: skip
FLAGS = (
    "--guidance nan", "--guidance inf", "--guidance -1", "--guidance 1e308", "--guidance 1e39", "--size 0x0",
    "--size 99999x99999", "--size 99999x8", "--size 32x-32", "--size ٣٢x٣٢", "--resolution 0", "--resolution -8",
    "--resolution 100000000", "--n 0", "--n -1", "--n 1000000000", "--n 99999999999999999999", "--steps 0",
    "--steps -5", "--steps 1000000000", "--steps 99999999999999999999", "--seed -1", "--seed 9223372036854775807",
    "--seed 99999999999999999999", "--temperature nan 0", "--temperature inf 0", "--temperature -1 0",
    "--temperature 1e308 1e308", "--guidance-interval 0.5 0.5", "--guidance-interval nan nan", "--strength 0.5",
    "--strength nan --image photos/astronaut.jpg", "--mask photos/astronaut.jpg", "--dtype int8",
    "--negative \ud800", "--negative \0",
)  # fmt: skip
EVAL_FLAGS = ("--max-images 0", "--max-images -1", "--n 0", "--n 1000000000", "--resolution 0",
              "--resolution 100000000",
              "--steps 1000000000", "--seed -1", "--guidance nan", "--max-images 99999999999999999999")  # fmt: skip


def on_path(make_it: Callable[[str], list[str]], name: str) -> Case:
    return lambda: make_it(name)


def with_flags(command: list[str], flags: str) -> Case:
    return lambda: [*command, *flags.split(" ")]


COMMAND_LINE: dict[str, Case] = {
    **{f"{door}: {what}": on_path(make, name) for door, make in PATHS.items() for what, name in NAMES.items()},
    **{f"sample {flags}": with_flags(["sample", "model", "a cat"], flags) for flags in FLAGS},
    **{f"eval {flags}": with_flags(["eval", "model", "--data", "photos"], flags) for flags in EVAL_FLAGS},
}


def special_file(make_argv: Callable[[str], list[str]], how: str) -> Case:
    def make() -> list[str]:
        path = Path("odd")
        {"FIFO": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": Path.mkdir,
         "loop": lambda path: path.symlink_to(path.name), "huge": make_huge, "binary": make_binary,
         "empty": Path.touch}[how](path)  # fmt: skip
        return make_argv("odd")

    return make


def make_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**36)


def make_binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


COMMAND_LINE |= {
    f"{door}: a {how}": special_file(make, how)
    for door, make in PATHS.items()
    for how in ("FIFO", "device", "folder", "loop", "huge", "binary", "empty")
    if door not in ("a command", "a flag", "list", "copy", "sample a prompt", "eval split", "convert keys")
}

# ---------------------------------------------------------------------------------------------- data


def data(make_it: Callable[[Path], object], *flags: str) -> Case:
    """Train on photos that are changed before."""

    def make() -> list[str]:
        make_it(own("photos"))
        return train(*flags)

    return make


def image_file(write: Callable[[Path], object], name: str = "odd.png") -> Case:
    """One more image, with a caption."""

    def make_it(photos: Path) -> None:
        (photos / "metadata.csv").unlink()
        for file in photos.glob("*.[jp][pn]g"):
            file.unlink()
        write(photos / name)
        (photos / Path(name).with_suffix(".txt")).write_text("odd")

    return data(make_it)


def caption(content: bytes) -> Case:
    def make_it(photos: Path) -> None:
        (photos / "metadata.csv").unlink()
        for file in photos.glob("*.[jp][pn]g"):
            file.with_suffix(".txt").write_bytes(content)

    return data(make_it)


def metadata(content: bytes | str, name: str = "metadata.jsonl") -> Case:
    def make_it(photos: Path) -> None:
        (photos / "metadata.csv").unlink()
        (photos / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    return data(make_it)


def metadata_file(make_it: Callable[[Path], object]) -> Case:
    return data(lambda photos: ((photos / "metadata.csv").unlink(), make_it(photos / "metadata.csv")))


def outside(name: str) -> Case:
    def make_it(photos: Path) -> None:
        Image.new("RGB", (40, 40)).save("outside.png")
        names = [path.name for path in photos.glob("*.[jp][pn]g")]
        (photos / "metadata.csv").unlink()
        rows = [{"file_name": row, "text": "x"} for row in [*names, name.replace("HERE", str(Path.cwd()))]]
        (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    return data(make_it)


def parquet(columns: dict[str, Any], name: str = "data.parquet") -> Case:
    def make() -> list[str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), name)
        return train("--data", name)

    return make


def png_bytes(side: int = 40) -> bytes:
    import io

    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return file.getvalue()


def bomb(path: Path) -> None:
    """A PNG of 30000 x 30000 pixels, in a few bytes."""
    import struct
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)))


def animated(path: Path) -> None:
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "green", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


LINE = json.dumps({"file_name": "astronaut.jpg", "text": "x"})
DATA: dict[str, Case] = {
    "a FIFO": image_file(os.mkfifo),
    "a device": image_file(lambda path: path.symlink_to("/dev/zero")),
    "a folder": image_file(Path.mkdir),
    "a link to nothing": image_file(lambda path: path.symlink_to("nothing.png")),
    "a link to itself": image_file(lambda path: path.symlink_to(path.name)),
    "an empty file": image_file(Path.touch),
    "a huge file": image_file(make_huge),
    "a truncated file": image_file(lambda path: path.write_bytes(png_bytes()[:60])),
    "a bomb": image_file(bomb),
    "1x1": image_file(lambda path: Image.new("RGB", (1, 1)).save(path)),
    "1x100000": image_file(lambda path: Image.new("RGB", (1, 100_000)).save(path)),
    "16 bits": image_file(lambda path: Image.new("I;16", (40, 40)).save(path)),
    "CMYK": image_file(lambda path: Image.new("CMYK", (40, 40)).save(path), "odd.jpg"),
    "animated GIF": image_file(animated, "odd.gif"),
    "animated PNG": image_file(animated),
    "an escape in a name": image_file(lambda path: path.write_text("x"), "\x1b[31m.png"),
    "a lone byte in a name": image_file(lambda path: Image.new("RGB", (40, 40)).save(path), os.fsdecode(b"\xff.png")),
    "captions of 5 MB": caption(b"a cat " * 900_000),
    "captions of one word of 5 MB": caption(b"a" * 5_000_000),
    "captions with NUL": caption(b"a\0b"),
    "captions with escapes": caption(b"\x1b[31m"),
    "captions not UTF-8": caption(b"\xff"),
    "a huge caption": data(lambda photos: ((photos / "metadata.csv").unlink(), make_huge(photos / "astronaut.txt"))),
    "metadata is a FIFO": metadata_file(os.mkfifo),
    "metadata is a folder": metadata_file(Path.mkdir),
    "metadata is huge": metadata_file(make_huge),
    "metadata text is a number": metadata(LINE.replace('"x"', "5")),
    "metadata text is a dict": metadata(LINE.replace('"x"', "{}")),
    "metadata text is a list of numbers": metadata(LINE.replace('"x"', "[1]")),
    "metadata text is nested": metadata(LINE.replace('"x"', DEEP)),
    "metadata text is a surrogate": metadata(LINE.replace('"x"', '"\\ud800"')),
    "metadata text has NUL": metadata(LINE.replace('"x"', '"a\\u0000b"')),
    "metadata number of many digits": metadata(LINE.replace('"x"', "9" * 5000)),
    "metadata name is a number": metadata(LINE.replace('"astronaut.jpg"', "5")),
    "metadata name is a list": metadata(LINE.replace('"astronaut.jpg"', "[]")),
    "metadata name is empty": metadata(LINE.replace("astronaut.jpg", "")),
    "metadata name has NUL": metadata(LINE.replace("astronaut.jpg", "a\\u0000.jpg")),
    "metadata name is a surrogate": metadata(LINE.replace("astronaut.jpg", "\\ud800.jpg")),
    "metadata name is long": metadata(LINE.replace("astronaut", "a" * 5000)),
    "metadata csv field is huge": metadata("file_name,text\nastronaut.jpg," + "a" * 200_000, "metadata.csv"),
    "metadata csv has no header": metadata("", "metadata.csv"),
    "metadata csv of commas": metadata(",,,\n,,,", "metadata.csv"),
    "outside, by ..": outside("../outside.png"),
    "outside, absolute": outside("HERE/outside.png"),
    "outside, a system file": outside("/etc/passwd"),
    "not an image": outside("../toy.py"),
    "parquet of numbers": parquet({"image": [1, 2], "text": ["a", "b"]}),
    "parquet of texts": parquet({"image": ["/etc/passwd"], "text": ["a"]}),
    "parquet of a path": parquet({"image": [{"bytes": None, "path": "/etc/passwd"}], "text": ["a"]}),
    "parquet of nothing": parquet({"image": [{"bytes": None, "path": None}], "text": ["a"]}),
    "parquet of a path alone": parquet({"image": [{"path": "/etc/passwd"}], "text": ["a"]}),
    "parquet of bytes as text": parquet({"image": [{"bytes": "x", "path": "y"}], "text": ["a"]}),
    "parquet of a number as bytes": parquet({"image": [{"bytes": 5, "path": 6}], "text": ["a"]}),
    "parquet with number texts": parquet({"image": [png_bytes()], "text": [5]}),
    "parquet with no columns": parquet({}),
    "parquet with no rows": parquet({"image": [b"x"][:0], "text": ["a"][:0]}),
    "parquet with lists of lists": parquet({"image": [png_bytes()], "text": [[["a"]]]}),
    "parquet with NUL": parquet({"image": [png_bytes()], "text": ["a\0"]}),
    "parquet with junk": special_file(lambda name: train("--data", str(Path(name).rename("x.parquet"))), "binary"),
    "parquet with an escape": parquet({"image": [b"x"], "\x1b[31m": ["a"]}),
    "huge parquet": special_file(lambda name: train("--data", str(Path(name).rename("x.parquet"))), "huge"),
    "saved, junk": data(lambda photos: (photos / "state.json").write_text("{}")),
    "saved, a list": data(lambda photos: (photos / "state.json").write_text("[]")),
    "saved, a dict": data(lambda photos: (photos / "dataset_dict.json").write_text('{"splits": 5}')),
    "saved, elsewhere": data(lambda photos: ((photos / "state.json").write_text(
        '{"_data_files": [{"filename": "/etc/passwd"}], "_fingerprint": "x", "_format_columns": null,'
        '"_format_kwargs": {}, "_format_type": null, "_split": "train"}'),
        (photos / "dataset_info.json").write_text("{}"))),
    "saved, a script": data(lambda photos: (photos / "photos.py").write_text("open('executed', 'w')")),
}  # fmt: skip
SIZES = (
    "resolution=100000", "resolution=1000000000", "batch_size=1000000000000000000", "max_iters=1000000000000000000",
    "image_variations=1000000000000000000", "num_workers=1000000", "model.adapters.transformer.r=1000000000",
    "model.vq_batch_size=1000000000", "warmup_iters=1000000000000000000", "prompts=1000000000",
    "train_dataloader.dataset.max_samples=1000000000000",
)  # fmt: skip
SCRATCH = (
    "num_hidden_layers=10000000", "hidden_size=1000000000", "intermediate_size=1000000000", "vocab_size=1000000000",
    "num_attention_heads=0", "num_attention_heads=7", "num_hidden_layers=-1", "num_hidden_layers=0", "hidden_size=0",
    "hidden_size=-5", "sample_size=100000", "block_out_channels=1000000000", "codebook_size=1000000000",
    "num_res_blocks=1000000000", "hidden_size='x'", "hidden_size=None", "hidden_size=[1]", "hidden_size=1.5",
    "block_num_heads=0", "hidden_dropout=5.0", "micro_cond_encode_dim=0", "micro_cond_encode_dim=7",
)  # fmt: skip
CLIP = ("num_hidden_layers=10000000", "hidden_size=1000000000", "vocab_size=1000000000", "hidden_size=0",
        "max_position_embeddings=1000000000", "hidden_act='x'", "num_attention_heads=7", "hidden_size='x'")  # fmt: skip
VQ = ("latent_channels=1000000000", "num_vq_embeddings=1000000000", "block_out_channels=[1000000000]",
      "layers_per_block=10000000", "norm_num_groups=0", "block_out_channels=[]", "block_out_channels=5",
      "down_block_types=['x']", "act_fn='x'", "latent_channels='x'")  # fmt: skip


def from_sizes(component: str, cls: str, sizes: str) -> Case:
    """Train a component from scratch with one of its sizes changed."""
    small = {"text_encoder": text_config("toy"), "transformer": transformer_config("toy", 32)}.get(component, {})
    key, _, value = sizes.partition("=")
    given = {**{name: repr(item) for name, item in small.items()}, key: value}
    options = ", ".join(f"{name}={text}" for name, text in given.items())
    if component == "vqvae":
        return config_file(VQ_CONFIG.format(sizes=sizes))
    module = "transformers" if component == "text_encoder" else "diffusers"
    line = f"model = dict(adapters=None, {component}=dict(type={cls}, {options}), train=[{component!r}])"
    return config_file(f"from {module} import {cls}\nextends = 'toy.py'\n{line}\n")


VQ_CONFIG = """
from torch.optim import AdamW
from diffengine.datasets import Crop, ImageTextDataset, Resize, ToTensor
from diffengine.models.vq import VQTokenizerModel
model = dict(type=VQTokenizerModel, vqvae=dict({sizes}), reseed_every=3, reseed_until=9)
train_dataloader = dict(
    dataset=dict(type=ImageTextDataset, path="photos"),
    image_transforms=[dict(type=Resize, size=32), dict(type=Crop, size=32), dict(type=ToTensor)], batch_size=2,
)
optim_wrapper = dict(optimizer=dict(type=AdamW, lr=1e-3), clip_grad=1.0)
train_cfg = dict(max_iters=1)
"""


DATA |= {f"size {text}": option(text) for text in SIZES}
DATA |= {f"transformer {text}": from_sizes("transformer", "UVit2DModel", text) for text in SCRATCH}
DATA |= {f"text encoder {text}": from_sizes("text_encoder", "CLIPTextConfig", text) for text in CLIP}
DATA |= {f"VQ model {text}": from_sizes("vqvae", "VQModel", text) for text in VQ}
DATA |= {
    f"tokenizer {text}": config_file(
        "from transformers import CLIPTextConfig\nextends = 'toy.py'\n"
        f"model = dict(adapters=None, train=['transformer', 'text_encoder'], tokenizer=dict({text}), "
        "text_encoder=dict(type=CLIPTextConfig, hidden_size=24, intermediate_size=32, num_attention_heads=2))"
    )
    for text in ("vocab_size=10**12", "vocab_size=-1", "max_length=10**12", "vocab_size='x'", "vocab_size=600.5")
}

# ---------------------------------------------------------------------------------------------- checkpoints

REPLACEMENTS: dict[str, Any] = {
    "None": None, "text": "x", "list": [1], "dict": {"a": 1}, "tensor": torch.zeros(2), "negative": -5, "large": 10**9,
    "huge": 10**30, "nan": float("nan"), "bytes": b"x", "true": True, "empty text": "", "half": 0.5,
}  # fmt: skip


def paths_in(value: Any, depth: int = 4) -> Iterator[tuple]:
    """The path to each value in nested dicts and lists; of a long one, the first and the last item."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if type(value) is list else []
    items = items if len(items) <= 24 else [items[0], items[-1]]
    for key, item in items if depth else []:
        yield (key,)
        for rest in paths_in(item, depth - 1):
            yield (key, *rest)


def replaced(value: Any, path: tuple, new: Any) -> Any:
    """A copy with another value at a path; `REMOVED` removes it."""
    value = copy.copy(value)
    key, *rest = path
    if rest:
        value[key] = replaced(value[key], tuple(rest), new)
    elif new is REMOVED:
        del value[key]
    else:
        value[key] = new
    return value


REMOVED = object()
READERS: dict[str, Callable[[str], list[str]]] = {
    "resume": lambda file: train("--resume", file),
    "init from": lambda file: train("--init-from", file),
    "convert": lambda file: ["convert", "toy.py", file, "out"],
    "sample": lambda file: ["sample", file, "a cat", "--steps", "1"],
    "convert --ema": lambda file: ["convert", "toy.py", file, "out", "--ema"],
}


def checkpoint(reader: str, path: tuple, new: Any) -> Case:
    """A run's checkpoint with another value at a path; within the config, by its keys."""

    def make() -> list[str]:
        state = torch.load("run/iter_1.pth", weights_only=True)
        if path[0] == "config" and len(path) > 1:
            state["config"] = json.dumps(replaced(json.loads(state["config"]), path[1:], new))
        else:
            state = replaced(state, path, new)
        torch.save(state, "changed.pth")
        return READERS[reader]("changed.pth")

    return make


def checkpoint_cases(state: dict) -> dict[str, Case]:
    """Every reader with every value of a checkpoint replaced by everything, and removed."""
    config = json.loads(state["config"])
    found = [*paths_in(state), *(("config", *path) for path in paths_in(config))]
    values = {**REPLACEMENTS, "removed": REMOVED}
    return {
        f"{reader} {'.'.join(map(str, path))} {name}": checkpoint(reader, path, value)
        for reader in READERS for path in found for name, value in values.items()
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- model folders

JSON_FILES = (
    "model_index.json", "vqvae/config.json", "transformer/config.json", "text_encoder/config.json",
    "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json",
    "tokenizer/vocab.json",
)  # fmt: skip
CONTENTS: dict[str, bytes] = {
    "nothing": b"", "garbage": bytes(range(256)), "a list": b"[]", "an empty object": b"{}", "a number": b"5",
    "null": b"null", "a text": b'"x"', "nested": DEEP.encode(), "cut": b'{"a": ', "NaN": b'{"a": NaN}',
    "digits": b'{"a": ' + b"9" * 5000 + b"}", "UTF-16": '{"a": 1}'.encode("utf-16"), "NUL": b'{"a": "\0"}',
    "duplicate": b'{"_class_name": "X", "_class_name": 5}', "surrogate": b'{"_class_name": "\\ud800"}',
}  # fmt: skip
JSON_VALUES: dict[str, Any] = {
    "null": None, "text": "x", "list": [], "dict": {}, "negative": -1, "zero": 0, "large": 10**9, "huge": 10**30,
    "float": 1.5, "true": True, "numbers": [1, 2], "surrogate": "\ud800",
}  # fmt: skip
OPENERS: dict[str, Callable[[], list[str]]] = {
    "sample": lambda: ["sample", "model", "a cat", "--steps", "1"],
    "train": lambda: train(),
}


def model_file(opener: str, file: str, change: Callable[[Path], object]) -> Case:
    def make() -> list[str]:
        change(own("model") / file)
        return OPENERS[opener]()

    return make


def json_value(path: tuple, value: Any) -> Callable[[Path], object]:
    return lambda file: file.write_text(json.dumps(replaced(json.loads(file.read_text()), path, value)))


def content(data: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(data)


def odd_file(make_it: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda file: (file.unlink(), make_it(file))


def safetensors(header: bytes | dict, body: bytes = b"\0" * 64) -> Callable[[Path], object]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda file: file.write_bytes(len(text).to_bytes(8, "little") + text + body)


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
WEIGHTS: dict[str, Callable[[Path], object]] = {
    "empty": content(b""), "garbage": content(bytes(range(256)) * 9), "FIFO": odd_file(os.mkfifo),
    "device": odd_file(lambda file: file.symlink_to("/dev/zero")), "folder": odd_file(Path.mkdir),
    "huge": make_huge, "missing": Path.unlink,
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "header of 2**62": content((2**62).to_bytes(8, "little") + b"{}"),
    "no JSON": safetensors(b"{"), "list": safetensors(b"[]"), "nested": safetensors(DEEP.encode()),
    "another weight": safetensors({"x": ENTRY}),
    "offsets beyond": safetensors({"x": {**ENTRY, "data_offsets": [0, 999]}}),
    "offsets turned": safetensors({"x": {**ENTRY, "data_offsets": [16, 0]}}),
    "negative shape": safetensors({"x": {**ENTRY, "shape": [-4]}}),
    "large shape": safetensors({"x": {**ENTRY, "shape": [2**62, 8]}}),
    "unknown dtype": safetensors({"x": {**ENTRY, "dtype": "X"}}),
    "metadata": safetensors({"__metadata__": {"format": "x"}, "x": ENTRY}),
    "no entries": safetensors({}),
}  # fmt: skip


def other_shape(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: torch.zeros(3, 5) for name in load_file(file)}, file, {"format": "pt"})


def other_dtype(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: item.to(torch.int8) for name, item in load_file(file).items()}, file, {"format": "pt"})


def of_nan(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: item.fill_(float("nan")) for name, item in load_file(file).items()}, file, {"format": "pt"})


class Malicious:
    """A pickle that creates a file when it is loaded."""

    def __reduce__(self) -> tuple:
        return open, ("executed", "w")


def pickled(file: Path) -> None:
    import pickle

    file.unlink()
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "adapter_model.bin"):
        file.with_name(name).write_bytes(pickle.dumps({"x": Malicious()}))


def torch_pickled(file: Path) -> None:
    file.unlink()
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "adapter_model.bin"):
        torch.save({"x": Malicious()}, file.with_name(name))


def remote_code(file: Path) -> None:
    """A config that names code in its folder."""
    (file.parent / "code.py").write_text("open('executed', 'w')\nclass A: pass\n")
    found = json.loads(file.read_text())
    names = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoModelForMaskedLM")
    found["auto_map"] = dict.fromkeys(names, "code.A") | {"AutoTokenizer": ["code.A", "code.A"]}
    file.write_text(json.dumps(found))


WEIGHTS |= {"other shape": other_shape, "other dtype": other_dtype, "of NaN": of_nan, "pickled": pickled,
            "pickled by torch": torch_pickled}  # fmt: skip
WEIGHT_FILES = (
    "vqvae/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)  # fmt: skip


def class_name(name: Any) -> Callable[[Path], object]:
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": name}))


def model_cases(model: Path) -> dict[str, Case]:
    """Every JSON file of a model folder with every content, and every value in it replaced."""
    found: dict[str, Case] = {}
    values = {**JSON_VALUES, "removed": REMOVED}
    for opener in OPENERS:
        for file in JSON_FILES:
            for name, data in CONTENTS.items():
                found[f"{opener} {file} {name}"] = model_file(opener, file, content(data))
            for name in ("FIFO", "folder", "huge", "missing"):
                found[f"{opener} {file} {name}"] = model_file(opener, file, WEIGHTS[name])
            found[f"{opener} {file} remote code"] = model_file(opener, file, remote_code)
            depth = 1 if file == "tokenizer/vocab.json" else 3
            for path in paths_in(json.loads((model / file).read_text()), depth):
                for name, value in values.items():
                    key = ".".join(map(str, path))
                    found[f"{opener} {file} {key} {name}"] = model_file(opener, file, json_value(path, value))
        for file in WEIGHT_FILES:
            for name, change in WEIGHTS.items():
                found[f"{opener} {file} {name}"] = model_file(opener, file, change)
    for name in ("os.system", "../x", "StableDiffusionPipeline", "AmusedX", "", 5, None, ["os", "system"], "a\0b"):
        for file in JSON_FILES[:3]:
            found[f"class {name!r} in {file}"] = model_file("sample", file, class_name(name))
    return found


# ---------------------------------------------------------------------------------------------- adapter folders


def adapter_file(file: str, change: Callable[[Path], object]) -> Case:
    def make() -> list[str]:
        shutil.copytree(Path("run").resolve() / "transformer", "adapter")
        change(Path("adapter") / file)
        return ["sample", "adapter", "a cat", "--steps", "1"]

    return make


def adapter_cases(adapter: Path) -> dict[str, Case]:
    """Every content and value of adapter_config.json, and all sorts of weights."""
    config, weights = "adapter_config.json", "adapter_model.safetensors"
    settings = json.loads((adapter / config).read_text())
    values = {**JSON_VALUES, "removed": REMOVED, "module": "os.system", "bomb": "(a+)+$"}
    found = {f"{config} {name}": adapter_file(config, content(data)) for name, data in CONTENTS.items()}
    found |= {
        f"{config} {'.'.join(map(str, path))} {name}": adapter_file(config, json_value(path, value))
        for path in paths_in(settings, 2) for name, value in values.items()
    }  # fmt: skip
    found |= {f"{weights} {name}": adapter_file(weights, change) for name, change in WEIGHTS.items()}
    many = {"target_modules": "(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*!", "peft_type": "PROMPT_TUNING"}
    for key, value in many.items():
        found[f"{config} {key} {value[:9]}"] = adapter_file(config, json_value((key,), value))
    for method in ("PREFIX_TUNING", "ADALORA", "XLORA", "POLY", "IA3", "LOKR", "VERA", "TRAINABLE_TOKENS", "BONE", "X"):
        found[f"{config} peft_type {method}"] = adapter_file(config, json_value(("peft_type",), method))
    mapping = {"base_model_class": "system", "parent_library": "os"}
    found[f"{config} auto_mapping of os"] = adapter_file(config, json_value(("auto_mapping",), mapping))
    return found


# ---------------------------------------------------------------------------------------------- caches and disks


def overwritten(file: Path, where: float, content: bytes) -> None:
    """Write bytes into a file, at a share of its length."""
    data = bytearray(file.read_bytes())
    start = int(where * len(data))
    data[start : start + len(content)] = content
    file.write_bytes(data)


def damaged_checkpoint(reader: str, where: float, content: bytes) -> tuple[str, Case]:
    def make() -> list[str]:
        shutil.copy("run/iter_1.pth", "changed.pth")
        overwritten(Path("changed.pth"), where, content)
        return READERS[reader]("changed.pth")

    return f"{reader}, {content!r} at {where}", make


def damaged_model(file: str, where: float, content: bytes) -> tuple[str, Case]:
    return f"{file}, {content!r} at {where}", model_file("sample", file, lambda path: overwritten(path, where, content))


def cached(change: Callable[[Path], object], number: int) -> Case:
    """Train with a token cache whose file of this number was changed."""

    def make() -> list[str]:
        files = sorted(path for path in own("tokens").rglob("*") if path.is_file())
        change(files[number % len(files)])
        return train(*CACHED)

    return make


def damaged_cache(number: int, where: float, content: bytes) -> tuple[str, Case]:
    name = f"file {number}, {content!r} at {where}"
    return name, cached(lambda path: overwritten(path, where, content), number)


def cache_cases(cache: Path) -> dict[str, Case]:
    """Every file of a cache with all sorts of content."""
    count = sum(path.is_file() for path in cache.rglob("*"))
    contents = {name: content(data) for name, data in CONTENTS.items()} | {
        name: WEIGHTS[name] for name in ("FIFO", "device", "folder", "huge", "missing", "cut", "header of 2**62")
    }
    return {
        f"file {number} {name}": cached(change, number) for number in range(count) for name, change in contents.items()
    }


def limited(size: int, *argv: str) -> tuple[str, Case]:
    """No file may become larger than `size` bytes: writing beyond fails as on a full disk."""

    def make() -> list[str]:
        own("run")
        own("tokens")
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return list(argv) or train(*CACHED)

    return f"{size} bytes {' '.join(argv)}", make


DISK: dict[str, Case] = dict(
    limited(size, *argv)
    for size in (0, 1, 1000, 10_000, 100_000, 1_000_000)
    for argv in (["convert", "run"], ["convert", "toy.py", "run/iter_1.pth", "out"], train(), train(*CACHED),
                 ["sample", "model", "a cat", "--steps", "1"], ["report", "run", "-o", "x.html"],
                 ["eval", "model", "--data", "photos", "--max-images", "1", "--steps", "1", "-o", "scores"],
                 ["copy-cfg", "toy.py", "x.py"])
)  # fmt: skip
