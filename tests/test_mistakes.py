"""User errors, and the one line that each prints: what was given, what is expected, what to do."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffengine.cli import main
from diffengine.engine.workdir import holds_run
from tests.support.models import make_model_folder
from tests.support.photos import write_photo_folder

CONFIG = """
extends = "amused_512_own"
resolution = 32
data = "photos"
pretrained = "model"
batch_size = 2
num_workers = 0
prompts = ["a cat"]
max_iters = 1
preview_every = None
validation_every = 0
default_hooks = dict(preview=dict(options=dict(num_inference_steps=1)))
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A toy model, four photos, a config, and a run of one step."""
    root = tmp_path_factory.mktemp("shared")
    make_model_folder(root / "model", "toy")
    write_photo_folder(root / "photos", 4, 48)
    (root / "toy.py").write_text(CONFIG, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["train", "toy.py", "--work-dir", "run"]) == 0
    return root


@pytest.fixture
def here(shared, tmp_path, monkeypatch):
    """A new current folder with links to the shared files."""
    for name in ("model", "photos", "toy.py", "run"):
        (tmp_path / name).symlink_to(shared / name)
    monkeypatch.chdir(tmp_path)
    for name in ("NPROC_PER_NODE", "NNODES", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def train(*argv):
    return ["train", "toy.py", "--work-dir", "new", *argv]


def options(*pairs):
    return lambda here: train("--cfg-options", *pairs)


def writable_copy(here, name):
    """Replaces a link by a copy of its folder, and returns it."""
    source = (here / name).resolve()
    (here / name).unlink()
    return shutil.copytree(source, here / name)


# ---------------------------------------------------------------------------------------------- errors


def typo_in_a_file(here):
    (here / "mine.py").write_text("extends = 'toy.py'\nlearning_rat = 1e-3\n")
    return ["train", "mine.py", "--work-dir", "new"]


def folder_without_captions(here):
    Path("bare").mkdir()
    shutil.copy("photos/astronaut.jpg", "bare")
    return train("--data", "bare")


def text_file_named_as_an_image(here):
    photos = writable_copy(here, "photos")
    for file in photos.glob("*.[jp][pn]g"):
        file.write_text("this is no image")
    return train()


def captions_in_latin_1(here):
    photos = writable_copy(here, "photos")
    (photos / "metadata.csv").write_bytes("file_name,text\nastronaut.jpg,café\n".encode("latin-1"))
    return train()


def metadata_names_no_file(here):
    photos = writable_copy(here, "photos")
    with (photos / "metadata.csv").open("a") as file:
        file.write("lost.png,a lost image\n")
    return train()


def output_in_a_loop(here):
    Path("loop").symlink_to("loop")
    return ["convert", "toy.py", "run/iter_1.pth", "loop"]


def empty_folder(here):
    Path("empty").mkdir()
    return train("--data", "empty")


def truncated_checkpoint(here):
    whole = Path("run/iter_1.pth").read_bytes()
    Path("cut.pth").write_bytes(whole[: len(whole) // 2])
    return ["convert", "toy.py", "cut.pth", "out"]


def foreign_file(here):
    torch.save({"weights": torch.zeros(2)}, "other.pth")
    return ["convert", "toy.py", "other.pth", "out"]


class Malicious:
    """A pickle that creates a file when it is loaded."""

    def __reduce__(self):
        return open, ("executed", "w")


def malicious_checkpoint(here):
    torch.save({"format": "diffengine-1", "model": Malicious()}, "malicious.pth")
    return ["convert", "toy.py", "malicious.pth", "out"]


def malicious_resume(here):
    torch.save({"format": "diffengine-1", "model": Malicious()}, "malicious.pth")
    return train("--resume", "malicious.pth")


def with_model_type(here, name, **more):
    state = torch.load("run/iter_1.pth", weights_only=True)
    config = json.loads(state["config"])
    config["model"] = {"type": name, **more}
    del config["pretrained"], config["gradient_checkpointing"]
    Path("edited").mkdir()
    torch.save({**state, "config": json.dumps(config)}, "edited/iter_1.pth")
    return "edited"


def checkpoint_with_a_foreign_class(here):
    return ["convert", with_model_type(here, "os.system", command="touch executed")]


def checkpoint_with_a_function_that_loads_code(here):
    name = "transformers.dynamic_module_utils.get_class_from_dynamic_module"
    return ["sample", with_model_type(here, name, class_reference="a.B"), "a cat"]


def model_without_tokenizer_files(here):
    model = writable_copy(here, "model")
    shutil.rmtree(model / "tokenizer")
    (model / "tokenizer").mkdir()
    return train()


def components_of_two_models(here):
    make_model_folder("tiny", "tiny")
    return train("--cfg-options", "model.text_encoder=tiny")


def resume_with_another_config(here):
    return [
        "train",
        "toy.py",
        "--work-dir",
        "new",
        "--resume",
        "run/iter_1.pth",
        "--cfg-options",
        "learning_rate=1",
    ]


def work_dir_is_a_file(here):
    Path("new").write_text("")
    return train()


def copy_over_a_file(here):
    return ["copy-cfg", "vq_32_emoji", "toy.py"]


def export_over_the_base_model(here):
    writable_copy(here, "model")
    return ["convert", "toy.py", "run/iter_1.pth", "model"]


ERRORS = {
    "no command": (lambda here: [], "diffengine: error: the following arguments are required: COMMAND"),
    "unknown command": (lambda here: ["trian"], "invalid choice: 'trian' .choose from .*train.*help` shows"),
    "unknown flag": (lambda here: train("--batch-size", "3"), "unrecognized arguments: --batch-size 3"),
    "no config": (lambda here: ["train"], "the following arguments are required: config"),
    "unknown config": (lambda here: ["train", "amused_512_pokemn"], "did you mean 'amused_512_pokemon_blip'"),
    "missing config file": (
        lambda here: ["train", "my.py"],
        "config file 'my.py' does not exist, or is no file; .*list-cfg",
    ),
    "unknown key": (options("batchsize=4"), "unknown key 'batchsize'; did you mean 'batch_size'"),
    "unknown key of a section": (
        options("model.pretraned=x"),
        "unknown key 'pretraned' for AmusedModel; did you",
    ),
    "share of tags": (options("drop_tags=1.5"), "drop_tags got 1.5; expected a probability from 0 to 1"),
    "tags kept of none": (
        options("keep_tags=2"),
        "keep_tags got 2, but captions do not vary; set shuffle_tags or drop_t",
    ),
    "variations of fixed captions": (
        options("caption_variations=2", "shuffle_tags=False"),
        "got 2, but captions do not vary; set shuffle_tags or drop_tags, or unset caption_variations",
    ),
    "no equals sign": (options("batch_size"), "got 'batch_size'; expected KEY=VALUE, as in batch_size=4"),
    "typo in a file": (typo_in_a_file, "unknown setting 'learning_rat'; did you mean 'learning_rate'"),
    "wrong type": (options("batch_size=many"), r"got 'many' \(str\); expected int, as in batch_size=2"),
    "wrong choice": (options("precision=fp8"), "precision got 'fp8' .*'auto' or 'bf16' or 'fp16' or 'fp32'"),
    "negative seed": (options("seed=-1"), "seed got -1; expected an int from 0"),
    "empty batch": (
        options("batch_size=0"),
        r"train_dataloader.batch_size got 0 \(int\); expected int from 1 to 1,000,000",
    ),
    "epochs and steps": (options("max_epochs=1"), "got max_epochs=1 and max_iters=1; expected one .* to None"),
    "neither epochs nor steps": (options("max_iters=None"), "got max_epochs=None and max_iters=None; expected one"),
    "fp16 on a CPU": (
        options("precision=fp16"),
        "precision got 'fp16' on a CPU.*; set --cfg-options precision=fp32, or bf16",
    ),
    "indivisible resolution": (options("resolution=36"), "got 36; .*sides divisible by 8: set resolution to 32"),
    "indivisible square": (
        options("resolution=36", "aspect=square"),
        "36x36 px; .*sides divisible by 8 .*: set resolution to 32",
    ),
    "no square to shape": (options("train_dataloader.image_transforms=[]"), "aspect='keep' got .* no square; expected"),
    "aspect below 1": (options("max_aspect=0.5"), "max_aspect got 0.5 .*; expected float from 1 to 64"),
    "training a frozen component": (
        options("model.train=['vqvae']"),
        r"model: train got \['vqvae'\]; expected one or both",
    ),
    "unknown preview option": (
        options("default_hooks.preview.options.guidance=3"),
        "preview option 'guidance' is unknown; expected one of guidance_scale",
    ),
    "missing data": (
        lambda here: train("--data", "no/such/folder"),
        "no file or folder 'no/such/folder'; expec",
    ),
    "data not in the cache": (
        lambda here: train("--data", "no-one/nothing"),
        "no-one/nothing.* cannot be loaded",
    ),
    "empty folder": (empty_folder, "no images in empty; expected images, Parquet files"),
    "wrong column": (
        options("train_dataloader.dataset.caption_column=title"),
        "no column 'title'; it has file_name, text; set --cfg-options caption_column=NAME",
    ),
    "no captions": (folder_without_captions, "no captions in bare; expected metadata.csv .* NAME.txt"),
    "text named as an image": (text_file_named_as_an_image, "photos has 4 problems:$"),
    "captions in latin-1": (captions_in_latin_1, "metadata.csv is not UTF-8 text .*; save it as UTF-8"),
    "metadata names no file": (
        metadata_names_no_file,
        "line 6 names the image 'lost.png', which does not exist",
    ),
    "missing model": (
        lambda here: train("--pretrained", "./no/model"),
        "model folder './no/model' does not exist",
    ),
    "model not in the cache": (
        lambda here: train("--pretrained", "no-one/none"),
        "cannot load .* of 'no-one/none'",
    ),
    "empty tokenizer folder": (
        model_without_tokenizer_files,
        "no tokenizer.*; expected vocab.json and merges.txt",
    ),
    "components of two models": (components_of_two_models, "text_encoder.hidden_size is 24; "),
    "work dir is a file": (work_dir_is_a_file, "cannot use work dir 'new'"),
    "existing run": (
        lambda here: ["train", "toy.py", "--work-dir", "run"],
        "'run' holds a run; --resume continues it, --work-dir DIR .* --overwrite deletes",
    ),
    "resume and overwrite": (
        lambda here: train("--overwrite", "--resume"),
        "--resume: not allowed with .*--overwr",
    ),
    "resume of a missing checkpoint": (lambda here: train("--resume", "no.pth"), "checkpoint 'no.pth' does not exist"),
    "resume with another config": (
        resume_with_another_config,
        "learning_rate was 8e-05 and is 1.0; repeat the flag",
    ),
    "resume of a malicious checkpoint": (
        malicious_resume,
        "'malicious.pth' holds more than tensors .* not read: it may run code",
    ),
    "launcher without torchrun": (
        lambda here: train("--launcher", "pytorch"),
        "got no RANK .* with torchrun",
    ),
    "convert with one argument": (
        lambda here: ["convert", "toy.py"],
        "got only 'toy.py'; expected CONFIG CKPT OUT",
    ),
    "convert without arguments": (lambda here: ["convert"], "convert got nothing to convert; expected CONFIG CKPT OUT"),
    "convert a missing checkpoint": (
        lambda here: ["convert", "run/iter_9.pth"],
        "got only 'run/iter_9.pth', which does not exist; expected CONFIG CKPT OUT, or the work dir",
    ),
    "keys instead of OUT": (
        lambda here: ["convert", "toy.py", "run/iter_1.pth", "--save-keys", "transformer", "transformer"],
        "convert got CONFIG and CKPT but no OUT",
    ),
    "convert with two arguments": (
        lambda here: ["convert", "toy.py", "run/iter_1.pth"],
        "but no OUT; expected CONFIG",
    ),
    "convert an empty dir": (lambda here: ["convert", "model"], "work dir 'model' holds no checkpoint"),
    "missing checkpoint": (lambda here: ["convert", "toy.py", "no.pth", "out"], "'no.pth' does not exist"),
    "truncated checkpoint": (truncated_checkpoint, r"'cut.pth' is broken or cut off \(\d+ bytes\)"),
    "foreign checkpoint": (foreign_file, "'other.pth' is no checkpoint of diffengine"),
    "another model": (
        lambda here: ["convert", "vq_32_emoji", "run/iter_1.pth", "out"],
        r"is of another model: got \S+AmusedModel, the config has \S+VQTokenizerModel; use .*'toy'",
    ),
    "malicious checkpoint": (
        malicious_checkpoint,
        "'malicious.pth' holds more than tensors .* not read: it may run code",
    ),
    "foreign class": (checkpoint_with_a_foreign_class, "names the class 'os.system', which is not run"),
    "function that loads code": (
        checkpoint_with_a_function_that_loads_code,
        "get_class_from_dynamic_module', which is not run",
    ),
    "unknown component": (
        lambda here: ["convert", "toy.py", "run/iter_1.pth", "out", "--save-keys", "vqvae"],
        "--save-keys got 'vqvae'; this model trains transformer",
    ),
    "pipeline and keys": (
        lambda here: ["convert", "run", "--pipeline", "--save-keys", "transformer"],
        "--pipeline writes every component; leave out --save-keys",
    ),
    "export over the base model": (
        export_over_the_base_model,
        "'model/transformer' is the transformer .*write to another folder",
    ),
    "sample of a folder without a model": (
        lambda here: ["sample", "photos", "a cat"],
        "'photos' is neither a pipeline folder",
    ),
    "sample of a hub name": (
        lambda here: ["sample", "no-one/none", "a cat"],
        "cannot load a pipeline of 'no-one/none'",
    ),
    "sample of a missing checkpoint": (
        lambda here: ["sample", "run/iter_9.pth", "a cat"],
        "checkpoint 'run/iter_9.pth' does not exist",
    ),
    "missing checkpoint as a model": (
        lambda here: train("--pretrained", "run/iter_9.pth"),
        "model folder 'run/iter_9.pth' does not exist",
    ),
    "sample of a missing folder": (lambda here: ["sample", "./none", "a cat"], "model folder './none' does not exist"),
    "zero steps": (
        lambda here: ["sample", "model", "a cat", "--steps", "0"],
        "--steps got 0; expected at least 1",
    ),
    "output is no PNG": (
        lambda here: ["sample", "model", "a cat", "-o", "a.jpg"],
        "--output got 'a.jpg'; .*ends in .png",
    ),
    "sample of an indivisible size": (
        lambda here: ["sample", "model", "a cat", "--resolution", "36"],
        "36x36 px; .*sides divisible by 8",
    ),
    "copy over a file": (copy_over_a_file, "'toy.py' exists; choose another name"),
    "copy to a text file": (lambda here: ["copy-cfg", "vq_32_emoji", "my.txt"], "got 'my.txt'; .*ends in .py"),
    "copy of an unknown config": (lambda here: ["copy-cfg", "vq_emoji", "my.py"], "did you mean 'vq_32_emoji'"),
    "copy of a base": (lambda here: ["copy-cfg", "amused", "my.py"], "got 'amused'; expected a shipped name"),
    "no matching config": (
        lambda here: ["list-cfg", "sdxl"],
        "no shipped config matches 'sdxl'; there are amused_",
    ),
}


def from_sizes(component, cls, **sizes):
    """A config that builds a component from scratch."""
    package = "transformers" if cls.startswith("CLIP") else "diffusers"

    def make(here):
        section = f"dict(type={cls}, **{sizes!r})"
        lines = [f"from {package} import {cls}", "extends = 'toy.py'",
                 f"model = dict(train=['transformer', 'text_encoder'], {component}={section})"]  # fmt: skip
        (here / "mine.py").write_text("\n".join(lines))
        return ["train", "mine.py", "--work-dir", "new"]

    return make


def sample(*argv):
    return lambda here: ["sample", "model", "a cat", *argv]


def prompts_of(make):
    """`sample` and the like with a file of prompts that is none."""

    def make_argv(here):
        make(here / "odd")
        return ["sample", "model", "--prompts", "odd"]

    return make_argv


def huge(path):
    with path.open("wb") as file:
        file.truncate(2**36)


# Values that would take all memory or time, and files that never end.
ERRORS |= {
    "output in a loop of links": (output_in_a_loop, "cannot write to .loop.: "),
    "images that are no tensors": (
        options("train_dataloader.image_transforms=[]", "aspect=square"),
        "put ToTensor last among them",
    ),
    "huge images": (options("resolution=100000"), "Resize size got 100,000; expected 16,384 pixels"),
    "endless run": (options("max_iters=1000000000000000000"), "max_iters got 10+; expected 1,000,000,000 at most"),
    "huge batch": (options("batch_size=1000000000000"), "batch_size got 10+ .*; expected int from 1 to 1,000,000"),
    "huge rank": (
        lambda here: ["train", "toy.py", "--work-dir", "new", "--cfg-options", "model.train=[]",
                      "model.adapters={'transformer': {'type': 'peft.LoraConfig', 'r': 1000000000, "
                      "'target_modules': ['to_q']}}"],
        "adapters.transformer got the rank 1000000000; expected at most 8,192",
    ),
    "many layers": (
        from_sizes("transformer", "UVit2DModel", num_hidden_layers=10**7),
        "transformer.num_hidden_layers got 10000000; expected from 0 to 1,000",
    ),
    "many residual blocks": (
        from_sizes("transformer", "UVit2DModel", num_res_blocks=10**9), "num_res_blocks got 10+; expected from 0 to"
    ),
    "wide layers": (
        from_sizes("transformer", "UVit2DModel", hidden_size=10**9), "hidden_size got 10+; expected from 0 to 1,048,576"
    ),
    "negative width": (from_sizes("transformer", "UVit2DModel", hidden_size=-5), "hidden_size got -5; expected from 0"),
    "size of another type": (
        from_sizes("transformer", "UVit2DModel", hidden_size="x"), r"hidden_size got 'x' \(str\); expected int"
    ),
    "no model": (options("model={'type': 'builtins.dict'}"), "model got <class 'dict'>; expected a subclass of"),
    "no backend": (options("vis_backends=[{'type': 'builtins.dict'}]"), "vis_backends got {'save_dir': 'new'}; "),
    "no transform": (options("train_dataloader.transforms=[{'type': 'builtins.str'}]"), "a transform got ''; expected"),
    "no optimizer": (
        options("optim_wrapper.optimizer={'type': 'builtins.dict'}"), "optimizer builtins.dict is no torch.optim.Opti"
    ),
    "no hook": (options("custom_hooks=[{'type': 'os.getcwd'}]"), "custom_hooks got os.getcwd; expected a subclass of"),
    "learning rate as text": (
        options("optim_wrapper.optimizer.lr=1e-4x"), r"optimizer.lr got '1e-4x' \(str\); expected float or Tensor"
    ),
    "data with a long name": (
        lambda here: train("--data", "a" * 300), "cannot read or write 'a+': File name too long; check"
    ),
    "pretrained with a long name": (
        lambda here: train("--pretrained", "a/" * 3000), "cannot read or write 'a/.*': File name too long; check"
    ),
    "data of no user": (lambda here: train("--data", "~nobody-here/x"), "names the home of a user that does not exist"),
    "many images": (sample("--n", "1000000000"), "--n got 1,000,000,000; expected 100,000 at most"),
    "huge images of sample": (sample("--size", "99999x99999"), "--size got 99,999; expected 16,384 pixels at most"),
    "huge resolution": (sample("--resolution", "100000000"), "--resolution got 100,000,000; expected 16,384 pixels"),
    "overflowing guidance": (sample("--guidance", "1e39"), r"guidance_scale got 1e\+39; expected a number from 0 to"),
    "infinite guidance": (sample("--guidance", "1e400"), "--guidance got inf; expected a number from 0"),
    "overflowing temperature": (sample("--temperature", "1e308", "0"), "temperature got .*; expected a number"),
    "endless steps": (sample("--steps", "1000000000000"), "got 10+ steps for .* expected at most one step per token"),
    "long seed": (sample("--seed", str(2**70)), "--seed got 1180591620717411303424; expected a whole number"),
    "prompts in a FIFO": (prompts_of(os.mkfifo), "'odd' cannot be read: it is no regular file"),
    "prompts without end": (prompts_of(lambda path: path.symlink_to("/dev/zero")), "'odd' cannot be read"),
    "huge file of prompts": (prompts_of(huge), "'odd' has 68.72 GB; expected at most 10.0 MB"),
    "a prompt of 5 MB": (
        prompts_of(lambda path: path.write_text("a" * 5_000_000)), "a prompt of 5,000,000 characters; expected 100,000"
    ),
    "prompts with NUL": (prompts_of(lambda path: path.write_bytes(b"a\0b")), "--prompts 'odd' has NUL characters"),
    "a PNG that is a device": (sample("-o", "/dev/null"), "cannot write '/dev/null': '/dev/null' is no folder"),
    "a PNG below a file": (sample("-o", "toy.py/x.png"), "cannot write 'toy.py/x.png': 'toy.py' is no folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_error_is_one_line(here, case, capfd):
    make, message = ERRORS[case]
    if case == "fp16 on a CPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    argv = make(here)
    capfd.readouterr()
    assert main(argv) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 or (lines[0].endswith(" problems:") and all(line[:2] == "  " for line in lines[1:])), lines
    assert re.match(r"diffengine( [a-z-]+)?: error: ", lines[0])
    assert re.search(message, lines[0]), lines[0]
    assert not Path("executed").exists()
    assert not Path("out").exists()
    assert not holds_run(Path("new")), "left a run behind: a second try would fail"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(
            (
                "NPROC_PER_NODE",
                value,
                f"NPROC_PER_NODE got '{value}' in the environment; expected a whole number from 1 to 16",
            )
            for value in ("many", "0", "17")
        ),
        (
            "NNODES",
            "9" * 11,
            f"NNODES got '{'9' * 11}' in the environment; expected a whole number from 1 to 1,048,576",
        ),
        ("NNODES", "2", "NNODES=2 got no MASTER_ADDR; set it to the machine with NODE_RANK=0"),
    ],
)
def test_wrong_environment_variable(here, monkeypatch, capsys, name, value, message):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setenv(name, value)
    assert main(train()) == 2
    assert capsys.readouterr().err == f"diffengine train: error: {message}\n"


def test_chosen_precision_is_logged(shared):
    chosen = "(auto, " if torch.cuda.is_available() else "fp32 (auto, on a CPU"
    assert chosen in (shared / "run" / "log.txt").read_text(encoding="utf-8")


def test_custom_data_set(here, monkeypatch):
    """A config can name any importable class with `__len__` and `__getitem__`."""
    (here / "my_images.py").write_text(
        "from PIL import Image\n\n\nclass Mine:\n    def __init__(self, count: int):\n"
        "        self.count = count\n\n    def __len__(self):\n        return self.count\n\n"
        "    def __getitem__(self, index):\n"
        "        return {'image': Image.new('RGB', (40, 40), (90 * index, 0, 0)), 'text': 'red'}\n"
    )
    (here / "mine.py").write_text(
        "from my_images import Mine\n\nextends = 'toy.py'\ntrain_dataloader = dict(dataset=dict(type=Mine, count=2))\n"
    )
    monkeypatch.syspath_prepend(here)
    assert main(["train", "mine.py", "--work-dir", "new"]) == 0
    assert (here / "new" / "iter_1.pth").exists()


@pytest.mark.parametrize("sample", ["5", "dict(text='a')", "dict(image=3, text='a')", "dict(image=IMAGE, text=[])"])
def test_custom_data_set_of_other_samples(here, monkeypatch, capsys, sample):
    (here / "other_images.py").write_text(
        "from PIL import Image\n\nIMAGE = Image.new('RGB', (40, 40))\n\n\nclass Other(list):\n"
        f"    def __init__(self):\n        super().__init__([{sample}] * 4)\n"
    )
    monkeypatch.syspath_prepend(here)
    monkeypatch.delitem(sys.modules, "other_images", raising=False)
    assert main(train("--cfg-options", "train_dataloader.dataset={'type': 'other_images.Other'}")) == 2
    printed = capsys.readouterr().err
    assert "expected {'image': an RGB PIL image, 'text': str or list of str}" in printed
    assert printed.count("\n") == 1


def test_damaged_image_can_be_skipped(here, capfd):
    """skip_unreadable=True works, as the error message suggests."""
    photos = writable_copy(here, "photos")
    Image.new("RGB", (40, 40)).save(photos / "black.png")
    (photos / "astronaut.jpg").write_text("this is no image")
    with (photos / "metadata.csv").open("a") as file:
        file.write("black.png,black\n")
    assert main(train("--cfg-options", "skip_unreadable=True", "max_iters=4")) == 0
    log = Path("new/log.txt").read_text()
    assert log.count("skipped what cannot be read: photos/astronaut.jpg; 1 so far") == 1
    assert (here / "new" / "iter_4.pth").exists()


def test_checkpoint_and_work_dir_generate_the_same_image(here):
    for source in ("run/iter_1.pth", "run"):
        assert main(["sample", source, "a cat", "--steps", "1", "-o", f"{Path(source).name}.png"]) == 0
    assert Path("iter_1.pth.png").read_bytes() == Path("run.png").read_bytes()


def test_out_may_come_after_save_keys(here):
    assert main(["convert", "--save-keys", "transformer", "toy.py", "run/iter_1.pth", "after"]) == 0
    assert sorted(path.name for path in Path("after").iterdir()) == ["diffengine.json", "transformer"]


def test_error_names_the_folder_that_relative_paths_start_from(here, tmp_path, monkeypatch, shared, capsys):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for argv in (["sample", "../run", "a cat"], ["convert", "../toy.py", "../run/iter_1.pth", "out"]):
        assert main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "model folder 'model' does not exist" in line
        assert line.endswith(
            f"was trained in '{shared}', where relative paths in its config start: go there, and try again"
        )
