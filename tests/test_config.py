"""Configs: find, extend, read, override, resolve, validate, write."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import pytest
from torch import Tensor

from diffengine import config
from diffengine.cli import main
from diffengine.engine.build import BUILDERS, load_config
from diffengine.errors import UserError
from diffengine.signatures import Between, children, fits, problems_of

TRAINABLE = sorted(config.shipped())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(action, *arguments, **options):
    """The one-line error that an action raises."""
    with pytest.raises(UserError) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- finding


def test_shipped_names():
    assert {
        "amused_256_pokemon_blip",
        "amused_32_emoji",
        "amused_512_own",
        "amused_512_pokemon_blip",
        "vq_32_emoji",
    } <= set(TRAINABLE)
    assert "amused" not in TRAINABLE  # a base config cannot be trained


@pytest.mark.parametrize("name", TRAINABLE)
def test_every_shipped_config_loads(name):
    settings, resolved = load_config(name)
    assert "${" in repr(settings)
    assert "${" not in repr(resolved)
    assert resolved["seed"] == 0


def test_unknown_name_and_file():
    assert error_of(config.find, "amused_512_pokemon") == (
        "unknown config 'amused_512_pokemon'; did you mean 'amused_512_pokemon_blip'?; "
        "`diffengine list-cfg` lists them all"
    )
    assert "config file 'my.py' does not exist" in error_of(config.find, "my.py")


# ---------------------------------------------------------------------------------------------- extending


def test_extends_by_name_path_and_list(folder):
    write(folder / "deep" / "one.py", "extends = '../two.py'\na = 1\nb = 1\n")
    write(folder / "two.py", "b = 2\nc = 2\n")
    write(folder / "three.py", "c = 3\nd = 3\n")
    assert config.read("deep/one.py") == {"a": 1, "b": 1, "c": 2}
    write(folder / "all.py", "extends = ['deep/one.py', 'three.py']\nd = 4\n")
    assert config.read("all.py") == {"a": 1, "b": 1, "c": 3, "d": 4}
    write(folder / "named.py", "extends = 'amused_512_own'\nresolution = 256\n")
    shipped = config.read("amused_512_own")
    assert config.read("named.py") == {**shipped, "resolution": 256}
    assert shipped["resolution"] == 512


def test_extending_itself_or_a_number_is_an_error(folder):
    write(folder / "a.py", "extends = 'b.py'\n")
    write(folder / "b.py", "extends = 'a.py'\n")
    assert "extends itself" in error_of(config.read, "a.py")
    write(folder / "c.py", "extends = 5\n")
    assert "extends got 5; expected a config's name or path" in error_of(config.read, "c.py")


def test_merge():
    base = {"type": "A", "x": 1, "inner": {"y": 1, "z": [1, 2]}}
    assert config.merge(base, {"inner": {"z": [3]}}) == {"type": "A", "x": 1, "inner": {"y": 1, "z": [3]}}
    assert config.merge(base, {"type": "A", "x": 2})["inner"] == base["inner"]
    assert config.merge({"section": base}, {"section": {"type": "B"}}) == {"section": {"type": "B"}}
    assert config.merge({"section": base}, {"section": None}) == {"section": None}
    assert base == {"type": "A", "x": 1, "inner": {"y": 1, "z": [1, 2]}}


def test_settings_replace_and_sections_merge():
    base = {"colours": {"red": 1}, "model": {"type": "A", "size": 1}}
    extended = config.extend(base, {"colours": {"blue": 2}, "model": {"depth": 3}})
    assert extended == {"colours": {"blue": 2}, "model": {"type": "A", "size": 1, "depth": 3}}


# ---------------------------------------------------------------------------------------------- reading


def test_imports_become_dotted_names(folder):
    text = (
        "import no_such_package\nimport torch.nn as nn, torch.optim\nfrom no.such.module import Thing as T\n"
        "a = dict(type=T)\nb = [nn.Linear, torch.optim.AdamW, no_such_package.x.Y]\n"
        "_helper = 3\nc = (_helper,)\n"
    )
    assert config.read(write(folder / "c.py", text)) == {
        "a": {"type": "no.such.module.Thing"},
        "b": ["torch.nn.Linear", "torch.optim.AdamW", "no_such_package.x.Y"],
        "c": [3],
    }


def test_validation_reports_a_missing_package(folder):
    path = write(
        folder / "c.py",
        "extends = 'amused_512_own'\nfrom no_such_package import Images\n"
        "train_dataloader = dict(dataset=dict(type=Images))\n",
    )
    config.read(path)
    message = error_of(load_config, path)
    assert "train_dataloader.dataset: type 'no_such_package.Images' cannot be imported" in message
    assert "No module named 'no_such_package'" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = 1\nb = = 2\n", "line 2: invalid syntax"),
        ("import os\na = os.getcwd()\n", "line 2: TypeError: 'os.getcwd' is only a name here"),
        ("a = 1 / 0\n", "line 1: ZeroDivisionError: division by zero"),
        ("a = b\n", "line 1: NameError: name 'b' is not defined"),
        ("a = {1, 2}\n", "holds more than plain values and imported classes: got {1, 2} of set"),
        ("a = float('inf')\n", "got inf of float"),
        ("def f():\n    pass\n", "holds more than plain values"),
        ("from .other import *\n", "line 1: ImportError: imports here are names of classes only"),
        ("from torch import *\n", 'to build on another config: extends = "NAME"'),
        ("a = 1\nraise BaseException('no')\n", "line 2: BaseException: no"),
        ("raise GeneratorExit\n", "line 1: GeneratorExit"),
        ("\n\nexit(3)\n", "line 3: SystemExit: 3"),
        ("raise SystemExit\n", "line 1: SystemExit"),
        ("def f():\n    f()\n\nf()\n", "line 2: RecursionError: maximum recursion depth exceeded"),
        ("class E(Exception):\n    def __str__(self):\n        raise self\nraise E\n", "line 4: E"),
        ("a = type('A', (), {'__repr__': lambda self: 5})()\n", "got a A of A"),
        ("a = 1\0\n", "source code string cannot contain null bytes"),
        ("a = " + "[" * 100_000, "too many nested parentheses"),
        ("a = []\nfor _ in range(5000): a = [a]\n", "holds values more than 30 levels deep"),
        ("a = {}\na['a'] = a\n", "or one that holds itself"),
        ("a = [0]\nfor _ in range(25): a = [a, a]\n", "holds more than 100,000 values"),
        ("a = 2**63\n", "holds an integer of more than 64 bits: got 9223372036854775808 of int"),
        ("a = 9 ** 9999\n", "holds an integer of more than 64 bits: got a int of int"),
        ("a = 'x\\0'\n", "holds text that is no UTF-8, or has NUL: got 'x\\x00' of str"),
        ("a = {'\\ud800': 1}\n", "holds text that is no UTF-8, or has NUL"),
        ("a = 'x' * 10**7\n", "holds more than 100,000 characters: got 'xxx"),
        ("#" * 2_000_000, "has 2,000,000 bytes; expected Python, 1,000,000 at most"),
    ],
)
def test_invalid_config_files(folder, text, expected):
    message = error_of(config.read, write(folder / "c.py", text))
    assert message.startswith(f"config '{folder / 'c.py'}'")
    assert expected in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("odd.py", os.mkfifo, "config file 'odd.py' does not exist, or is no file"),
        ("odd.py", Path.mkdir, "config file 'odd.py' does not exist, or is no file"),
        ("odd.py", lambda path: path.symlink_to("/dev/zero"), "config file 'odd.py' does not exist, or is no file"),
        ("odd.py", lambda path: path.symlink_to(path.name), "config file 'odd.py' does not exist, or is no file"),
        ("a" * 300 + ".py", None, "File name too long"),
        ("a/" * 5000 + "a.py", None, "File name too long"),
        ("~nobody-here/a.py", None, "config file '~nobody-here/a.py' does not exist"),
        ("\x1b[31m.py", None, r"config file '\x1b[31m.py' does not exist"),
        ("a\0.py", None, r"got the argument 'a\x00.py'; expected UTF-8 text without NUL"),
        ("\udcff.py", None, r"got the argument '\udcff.py'; expected UTF-8 text without NUL"),
        ("", None, "unknown config ''"),
    ],
)
def test_odd_config_paths(folder, name, make, expected, capsys):
    if make is not None:
        make(Path(name))
    assert main(["train", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert line.isprintable()
    assert len(line) < 2200


def test_a_long_chain_of_files(folder):
    for number in range(40):
        write(folder / f"c{number}.py", f"extends = 'c{number + 1}.py'\n")
    assert "is extended by a chain of 30 files" in error_of(config.read, "c0.py")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("${a}${a}", "refers to more than 100,000 characters"), (["${a}", "${a}"], "refers to more than 1,000 values")],
)
def test_references_that_double(text, expected, monkeypatch):
    monkeypatch.setattr(config, "MOST_VALUES", 1000)
    settings = {
        f"a{number}": json.loads(json.dumps(text).replace("${a}", f"${{a{number + 1}}}")) for number in range(40)
    }
    assert expected in error_of(config.resolve, {**settings, "a40": "x", "model": {"path": "${a0}"}})


def test_encodings(folder):
    (folder / "latin.py").write_bytes("data = 'é'\n".encode("latin-1"))
    assert "'latin.py' is not UTF-8 text" in error_of(config.read, "latin.py")
    (folder / "marked.py").write_bytes(b"\xef\xbb\xbf" + "data = 'é 猫'\n".encode())
    assert config.read("marked.py") == {"data": "é 猫"}


# ---------------------------------------------------------------------------------------------- overriding


@pytest.mark.parametrize(
    ("old", "text", "new"),
    [
        ("red", "  a photo, of 'it'  ", "  a photo, of 'it'  "),
        ("red", "5", "5"),
        ("red", "a=b", "a=b"),
        ("red", "None", None),
        (None, "a photo of sks dog", "a photo of sks dog"),
        (None, "5", 5),
        (None, "'5'", "5"),
        (1, "2", 2),
        (1, "None", None),
        (1.0, "2", 2.0),
        (1.0, "2e-4", 2e-4),
        (True, "False", False),
        (4, "['a b', 'c']", ["a b", "c"]),
        (["a"], "4", 4),
        ([1], "(2, 3)", [2, 3]),
        ("${size}", "7", 7),
    ],
)
def test_override_keeps_the_type(old, text, new):
    changed = config.override({"key": old, "size": 1}, [f"key={text}"])["key"]
    assert changed == new
    assert type(changed) is type(new)


@pytest.mark.parametrize(
    ("old", "text", "expected"),
    [
        (1, "1.5", "got 1.5 (float); expected int, as in key=1"),
        (1, "True", "got True (bool); expected int"),
        (1, "many", "got 'many' (str); expected int"),
        (1.0, "True", "got True (bool); expected float"),
        (1.0, "inf", "got 'inf' (str); expected float"),
        (True, "1", "got 1 (int); expected bool, as in key=True"),
        (True, "true", "got 'true' (str); expected bool"),
    ],
)
def test_override_of_another_type_is_an_error(old, text, expected):
    assert expected in error_of(config.override, {"key": old}, [f"key={text}"])


def test_override_by_path():
    base = {"model": {"type": "A", "layers": [{"p": 1}, {"p": 2}]}, "size": 1}
    options = ["model.layers.1.p=3", "model.layers.-2.p=4", "model.extra=x", "size=2", "custom_hooks=[]"]
    changed = config.override(base, [*options, "seed=7", "work_dir=a b"])
    assert changed == {
        "model": {"type": "A", "layers": [{"p": 4}, {"p": 3}], "extra": "x"},
        "size": 2, "custom_hooks": [], "seed": 7, "work_dir": "a b",
    }  # fmt: skip
    assert base["model"]["layers"] == [{"p": 1}, {"p": 2}]
    assert config.override({"sizes": [1, 2]}, ["sizes.1=5"]) == {"sizes": [1, 5]}


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("size", "got 'size'; expected KEY=VALUE, as in batch_size=4"),
        ("=3", "got '=3'; expected KEY=VALUE"),
        ("sise=3", "unknown key 'sise'; did you mean 'size'?"),
        ("modle.x=3", "there is no 'modle' in this config; did you mean 'model'?"),
        ("model.layers.2.p=1", "there is no 'model.layers.2' in this config; its parent is [{'p': 1}, {'p': 2}]"),
        ("model.layers.x=1", "there is no 'model.layers.x' in this config; its parent is [{'p': 1}, {'p': 2}]"),
        ("size.x=1", "there is no 'size.x' in this config; its parent is 1"),
        ("size.x.y=1", "there is no 'size.x' in this config; its parent is 1"),
    ],
)
def test_override_of_a_missing_path(option, expected):
    base = {"model": {"type": "A", "layers": [{"p": 1}, {"p": 2}]}, "size": 1}
    assert expected in error_of(config.override, base, [option])


# What messages advise, for the option and its value; {option} is one of the two columns.
ADVICE = re.compile(r"--cfg-options [\"\s]*([\w.{}]+)=([\w{}]+)")
# Options that a config has none of: (the config, or all with this data set or model; the options).
LACKING = {
    "EmojiDataset": {"image_column", "caption_column", "allow_outside", "captions_from_file_names"},
    "SubjectDataset": {"caption_column", "captions_from_file_names", "split"},
    "VQTokenizerModel": {"model.gradient_checkpointing"},
}


def advised() -> dict[str, str]:
    """Each option that a message advises to set, and the value."""
    files = Path(config.__file__).parent.rglob("*.py")
    found = dict(pair for file in files for pair in ADVICE.findall(file.read_text(encoding="utf-8")))
    columns = dict.fromkeys(["image_column", "caption_column"], found.pop("{option}"))
    plain = {"split": "train"}
    return {key: plain.get(key, re.sub(r"\{.*", "2", value)) for key, value in {**found, **columns}.items()}


def test_messages_advise_options() -> None:
    expected = {"skip_unreadable", "allow_outside", "num_workers", "cache", "image_column", "micro_batch_size"}
    assert expected <= advised().keys()


@pytest.mark.parametrize("name", TRAINABLE)
def test_advice_can_be_pasted(name: str) -> None:
    resolved = load_config(name)[1]
    types = [resolved["train_dataloader"]["dataset"]["type"], resolved["model"]["type"]]
    lacking = {option for each in types for option in LACKING.get(each.rpartition(".")[2], ())}
    for option, value in advised().items():
        if option not in lacking:
            load_config(name, [f"{option}={value}"])
    assert load_config(name, ["warmup_iters=3"])[1]["param_scheduler"]["warmup_iters"] == 3


def test_an_option_of_one_section_is_set_there() -> None:
    options = ["skip_unreadable=True", "caption='a cat'", "label_smoothing=0.1"]
    written, resolved = load_config("amused_512_own", options)
    assert written["train_dataloader"]["skip_unreadable"] is True
    assert resolved["train_dataloader"]["dataset"]["caption"] == "a cat"
    assert resolved["model"]["label_smoothing"] == 0.1


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("weights=0.1", "unknown key 'weights'"),
        ("skip_unreadble=1", "unknown key 'skip_unreadble'; did you mean 'skip_unreadable'?"),
        ("use=False", "unknown key 'use'; did you mean 'cache'?"),  # token_cache.use refers to the setting
        ("start_iter=3", "unknown key 'start_iter'"),  # the run passes it
        ("root=x", "'root' is an option of several sections; set one: "
         "train_dataloader.dataset.root, train_dataloader.transforms.0.root"),
    ],
)  # fmt: skip
def test_an_option_of_no_or_several_sections(folder: Path, option: str, expected: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(folder)
    write(folder / "rooted.py", "class A:\n    def __init__(self, root='.'): ...\n")
    text = "from rooted import A\nextends = 'amused_512_own'\ntrain_dataloader = dict(dataset=dict(type=A), "
    write(folder / "mine.py", text + "transforms=[dict(type=A)])\n")
    assert f"--cfg-options: {expected}" in error_of(load_config, "mine.py", [option])


# ---------------------------------------------------------------------------------------------- resolving


def test_references_keep_their_type():
    resolved = config.resolve(
        {
            "sides": [1, 2], "root": "/data", "data": "${root}/images", "none": None,
            "model": {"a": "${sides}", "b": ["${none}", "${data}"], "c": "x ${root} y"},
        }
    )  # fmt: skip
    assert resolved["model"] == {"a": [1, 2], "b": [None, "/data/images"], "c": "x /data y"}
    assert resolved["data"] == "/data/images"


def test_references_to_references():
    assert config.resolve({"a": "${b}", "b": "${c}", "c": 3, "model": {"x": "${a}"}})["model"] == {"x": 3}
    assert "refers back to itself" in error_of(config.resolve, {"a": "${b}", "b": "${a}", "model": {"x": "${a}"}})


def test_one_error_lists_all_wrong_references():
    message = error_of(config.resolve, {"rate": 1, "batch": 2, "model": {"x": "${rat}", "y": ["${batc}"]}})
    assert message == (
        "the config has errors: "
        "unknown setting 'rate'; did you mean 'rat'? (nothing in this config uses it); "
        "unknown setting 'batch'; did you mean 'batc'? (nothing in this config uses it); "
        "model.x refers to setting 'rat', which does not exist; did you mean 'rate'?; "
        "model.y.0 refers to setting 'batc', which does not exist; did you mean 'batch'?"
    )


def test_unknown_setting_in_a_file_and_in_a_flag(folder):
    path = write(folder / "c.py", "extends = 'amused_512_own'\nresolutoin = 256\n")
    assert "unknown setting 'resolutoin'; did you mean 'resolution'?" in error_of(load_config, path)
    message = error_of(load_config, "vq_32_emoji", (), {"data": "images"})
    assert "config 'vq_32_emoji' has no setting 'data'; it has " in message


def test_settings_that_an_override_makes_unused_are_dropped(folder):
    settings, resolved = load_config("amused_512_own", ["train_dataloader.batch_size=2"])
    assert resolved["train_dataloader"]["batch_size"] == 2
    assert "batch_size" not in settings
    path = write(
        folder / "c.py",
        "extends = 'amused_512_own'\nfrom diffengine.datasets import EmojiDataset\n"
        "train_dataloader = dict(dataset=dict(type=EmojiDataset, size=64))\n",
    )
    settings, _ = load_config(path)
    assert "data" not in settings
    assert "unknown setting 'data'" in error_of(load_config, path, (), {"data": "images"})
    assert "unknown setting 'caption'" in error_of(load_config, path, ["caption=it"])


# ---------------------------------------------------------------------------------------------- validating


def test_one_error_lists_all_problems_of_a_config(folder):
    path = write(
        folder / "c.py",
        "extends = 'amused_512_own'\nresolutoin = 256\nbatch_size = 2.5\n"
        "model = dict(mask_shedule='linear', label_smoothing='much')\n"
        "optim_wrapper = dict(optimizer=dict(lrr=1))\n"
        "default_hooks = dict(previews=dict(every=2))\n",
    )
    message = error_of(load_config, path)
    for problem in (
        "unknown setting 'resolutoin'; did you mean 'resolution'?",
        "train_dataloader.batch_size got 2.5 (float); expected int",
        "model: unknown key 'mask_shedule' for AmusedModel; did you mean 'mask_schedule'?",
        "model.label_smoothing got 'much' (str); expected float",
        "optim_wrapper.optimizer: unknown key 'lrr' for AdamW; did you mean 'lr'?",
        "default_hooks.previews got {'every': 2}; expected dict(type=...)",
    ):
        assert message.count(problem) == 1, problem


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (
            "train_cfg.max_steps=5",
            "train_cfg: unknown key 'max_steps' for StepLoop; did you mean 'max_iters'?",
        ),
        ("train_cfg.runner=5", "train_cfg: unknown key 'runner' for StepLoop"),
        ("model.mask_schedule=cosin", "model.mask_schedule got 'cosin' (str); expected 'cosine' or 'linear'"),
        ("prompts=[1, 2]", "default_hooks.preview.prompts got [1, 2] (list); expected list[str] or int"),
        ("model=5", "section 'model' got 5; expected a dict"),
        ("train_dataloader.dataset=5", "train_dataloader.dataset got 5; expected dict(type=...)"),
        (
            "train_dataloader.dataset.path=None",
            "train_dataloader.dataset.path got None (NoneType); expected str",
        ),
        ("optim_wrapper.type=x", "section 'optim_wrapper' got type='x'; expected none"),
        ("custom_hooks=[{}]", "custom_hooks.0 got {}; expected dict(type=...)"),
        (
            "custom_hooks=[{'type': 'os.path'}]",
            "custom_hooks.0: type got os.path; expected a class or a function",
        ),
        ("custom_hooks=[{'type': 3}]", "custom_hooks.0.type got 3; expected an imported class"),
        ("seed=-1", "seed got -1; expected an int from 0 to 2**32 - 1"),
        ("work_dir=5", "work_dir got 5; expected a folder"),
    ],
)
def test_errors_in_sections(option, expected):
    assert expected in error_of(load_config, "amused_512_own", [option])


def test_missing_section_and_missing_option():
    assert config.validate({"model": {"type": "diffengine.models.amused.AmusedModel"}}, BUILDERS) == [
        f"no section '{name}'" for name in ("train_dataloader", "optim_wrapper", "train_cfg")
    ]
    assert problems_of({"type": "diffengine.datasets.Resize"}, "here") == ["here: Resize needs 'size'"]


def test_a_module_that_raises_on_import(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    for number, raised in enumerate(("RuntimeError('no')", "SystemExit(3)", "BaseException")):
        write(folder / f"broken{number}.py", f"x = 1\nraise {raised}\n")
        message = error_of(load_config, "vq_32_emoji", [f"custom_hooks=[{{'type': 'broken{number}.Hook'}}]"])
        assert f"broken{number}.py line 2: {raised.partition('(')[0]}" in message
    message = error_of(load_config, "vq_32_emoji", ["custom_hooks=[{'type': '..a.b'}]"])
    assert "custom_hooks.0: type '..a.b' cannot be imported" in message


# Settings that admit a value by its type; their classes check the range. All others must refuse it when it is read.
PATHS = {
    "cache_path", "class_data", "class_prompt", "data", "instance_prompt", "pretrained", "tag_separator",
    "validation_data",
}  # fmt: skip
NUMBERS = {
    "caption_dropout", "clip_grad", "drop_tags", "flip", "learning_rate", "lora_dropout", "min_transparent",
    "prior_loss_weight", "unmasked_weight", "validation_share", "weight_decay",
}  # fmt: skip
OPTIONAL = {
    "backgrounds", "cache_path", "caption_variations", "checkpoint_every", "class_data", "class_prompt", "clip_grad",
    "image_variations", "keep_checkpoints", "max_epochs", "max_iters", "micro_batch_size", "param_groups", "patience",
    "pretrained",
    "preview_every", "validation_data", "validation_every",
}  # fmt: skip
SWITCHES = {"cache", "compile", "gradient_checkpointing", "random_crop", "shuffle_tags"}


def references(value, path):
    """The settings that a section refers to, by path."""
    if isinstance(value, str):
        match = config.REFERENCE.fullmatch(value)
        return {path: match[1]} if match else {}
    return {key: name for index, item in children(value) for key, name in references(item, f"{path}.{index}").items()}


@pytest.mark.parametrize("name", ["amused_512_dreambooth_lora", "amused_32_emoji_lora", "vq_32_emoji"])
@pytest.mark.parametrize(
    ("value", "admit"),
    [
        ("1e-4", PATHS), ([1e-4], set()), ({"a": 1}, {"validation_data"}), (None, OPTIONAL), (0.5, NUMBERS),
        (1e308, NUMBERS), (True, SWITCHES),
    ],
)  # fmt: skip
def test_every_setting_with_values_of_wrong_types(name, value, admit):
    raw = config.read(name)
    used = {
        path: setting for key in config.SECTIONS & raw.keys() for path, setting in references(raw[key], key).items()
    }
    config_with = config.merge(config.extend(config.PLAIN, raw), dict.fromkeys(used.values(), value))
    problems = config.validate(config.substitute(config_with), BUILDERS)
    refused = {setting for path, setting in used.items() if any(text.startswith(f"{path} got ") for text in problems)}
    assert set(used.values()) - refused == admit & set(used.values())


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("batch_size=0", "train_dataloader.batch_size got 0 (int); expected int from 1 to 1,000,000"),
        ("batch_size=1000000000000", "expected int from 1 to 1,000,000"),
        ("image_variations=1000000000000", "expected int from 1 to 1,000,000 or NoneType"),
        ("num_workers=-1", "train_dataloader.num_workers got -1 (int); expected int from 0 to 1,024"),
        ("learning_rate='1e-4'", "learning_rate got '1e-4' (str); expected float"),
        ("learning_rate=(1e-4,)", "optim_wrapper.optimizer.lr got [0.0001] (list); expected float or Tensor"),
        ("learning_rate=nan", "learning_rate got 'nan' (str); expected float"),
        ("optim_wrapper.optimizer.lr=nan", "optim_wrapper.optimizer.lr got 'nan' (str); expected float or Tensor"),
        ("optim_wrapper.optimizer.betas=x", "optim_wrapper.optimizer.betas got 'x' (str); expected tuple"),
        ("optim_wrapper.optimizer.betas=[0.9, 'x']", "optim_wrapper.optimizer.betas got [0.9, 'x'] (list)"),
        ("model.adapters.transformer.r=x", "model.adapters.transformer.r got 'x' (str); expected int"),
        ("model.adapters.transformer.lora_alpha=x", "adapters.transformer.lora_alpha got 'x' (str); expected int"),
        ("rank=True", "rank got True (bool); expected int"),
        ("seed=" + "9" * 5000, "seed got '999"),
        ("seed=" + "(" * 90_000, "seed got '((("),
        ("seed=0x" + "f" * 5000, "seed got '0xfff"),
        ("custom_hooks.²=1", "there is no 'custom_hooks.²' in this config"),
        ("custom_hooks.--1=1", "there is no 'custom_hooks.--1' in this config"),
        ("custom_hooks.99999999999999999999=1", "there is no 'custom_hooks.99999999999999999999' in this config"),
        ("work_dir=\0", "--cfg-options: work_dir holds text that is no UTF-8, or has NUL"),
        ("data=\ud800", "holds text that is no UTF-8, or has NUL"),
    ],
)
def test_garbage_in_options(option, expected):
    message = error_of(load_config, "amused_512_own_lora", ["custom_hooks=[]", option])
    assert expected in message
    assert len(message) < 1000


def test_visualizer_backends_are_checked():
    _, resolved = load_config("vq_32_emoji", ["vis_backends=[{'type': 'mmengine.visualization.LocalVisBackend'}]"])
    assert resolved["vis_backends"] == [{"type": "mmengine.visualization.LocalVisBackend"}]
    option = "vis_backends=[{'type': 'mmengine.visualization.LocalVisBackend', 'img_save': 1}]"
    assert "unknown key 'img_save' for LocalVisBackend" in error_of(load_config, "vq_32_emoji", [option])


@pytest.mark.parametrize(
    ("value", "hint", "fit"),
    [
        (1, float, True),
        (True, int, False),
        (True, float, False),
        (1, bool, False),
        ([1, 2], list[int], True),
        ([1, "2"], list[int], False),
        ([1, 2], tuple[int, ...], True),
        ([1, 2], tuple[int, int], True),
        ([1, 2, 3], tuple[int, int], False),
        ("x", list[str], False),
        ({"a": 1}, dict, True),
        ([], dict[str, int], False),
        (None, int | None, True),
        ("anything", object, True),
        ("1", float | Tensor, False),
        (1, float | Tensor, True),
        ("1", Tensor, True),
        ([0.9, 0.95], tuple[float | Tensor, float | Tensor], True),
        ([0.9, "x"], tuple[float | Tensor, float | Tensor], False),
        ("x", Path | int, True),
        ("x", Sequence[str] | None, False),
        (["x"], Sequence[str] | None, True),
        ({"a": "x"}, dict[str, int], False),
        ({"type": "x"}, int | Tensor, True),
        (1, Literal[True], False),
        (5, Annotated[int, Between(1, 5)], True),
        (6, Annotated[int, Between(1, 5)] | None, False),
    ],
)
def test_fits(value, hint, fit):
    assert fits(value, hint) is fit


# ---------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("name", TRAINABLE)
def test_written_config_loads_unchanged(folder, name):
    settings, resolved = load_config(name, [], {"work_dir": "some 'where'"})
    path = write(folder / "config.py", config.to_text(settings, "line one\nline two"))
    assert load_config(path) == (settings, resolved)
    assert sorted(settings, key=config.SECTIONS.__contains__) == list(load_config(path)[0])
    text = (folder / "config.py").read_text(encoding="utf-8")
    assert text.startswith(f"# line one\n# line two\n{next(iter(settings))} = ")
    assert text.index("batch_size = ") < text.index("model = ")


def test_own_settings_come_first_then_those_of_the_last_base(folder):
    write(folder / "first.py", "a = 1\nb = 2\nc = 3")
    write(folder / "second.py", "d = 4\nb = 5")
    path = write(folder / "mine.py", "extends = ['first.py', 'second.py']\ne = 6\nc = 7")
    assert list(config.read(path).items()) == [("e", 6), ("c", 7), ("d", 4), ("b", 5), ("a", 1)]


@pytest.mark.parametrize("name", TRAINABLE)
def test_copy_cfg(folder, monkeypatch, name, capsys):
    assert main(["copy-cfg", name, "mine/my.py"]) == 0
    assert capsys.readouterr().out == "wrote mine/my.py; train it with: diffengine train mine/my.py\n"
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert load_config("../mine/my.py") == load_config(name)
    text = (folder / "mine" / "my.py").read_text(encoding="utf-8")
    uncommented = [line.removeprefix("# ") if " = " in line else line for line in text.splitlines()]
    path = write(folder / "all.py", "\n".join(uncommented))
    shipped, everything = load_config(name)[1], load_config(path)[1]
    assert everything.pop("train_dataloader") == {**shipped.pop("train_dataloader"), "skip_unreadable": True}
    assert everything == shipped
    edited = write(folder / "edited.py", text.replace("# batch_size = ", "batch_size = 1") + "\n")
    assert load_config(edited)[1]["train_dataloader"]["batch_size"] != shipped["batch_size"]


# ---------------------------------------------------------------------------------------------- settings


def settings_of(name):
    written = config.read(name)
    return {key: value for key, value in written.items() if key not in config.SECTIONS}


def different(value):
    """A different valid value."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [*value, "more"]
    return 3 if value is None else {**value, "more": 1}


def sections(resolved):
    return {key: value for key, value in resolved.items() if key in config.SECTIONS}


@pytest.mark.parametrize(("name", "setting"), [(name, setting) for name in TRAINABLE for setting in settings_of(name)])
def test_every_setting_changes_a_section(name, setting):
    written = config.read(name)
    before, after = (config.resolve(each) for each in (written, {**written, setting: different(written[setting])}))
    assert sections(before) != sections(after)


@pytest.mark.parametrize("name", TRAINABLE)
def test_sections_refer_to_settings(name):
    """A key with the name of a setting holds a reference to the setting, not a copy of its value."""
    written = config.read(name)
    settings = settings_of(name)

    def literals(value, path):
        if isinstance(value, dict):
            return [leaf for key, item in value.items() for leaf in literals(item, f"{path}.{key}")]
        if isinstance(value, list):
            return [leaf for item in value for leaf in literals(item, path)]
        return [(path.rpartition(".")[2], path)] if not str(value).startswith("${") else []

    found = [path for section in sections(written).items() for key, path in literals(section[1], section[0])
             if key in settings]  # fmt: skip
    assert found == []


def test_overrides_reach_every_section():
    _, resolved = load_config("amused_512_own", ["resolution=256", "data=here", "caption=it", "batch_size=2"])
    assert resolved["train_dataloader"] == {
        "dataset": {
            "type": "diffengine.datasets.ImageTextDataset", "path": "here", "caption": "it", "prefix": "",
        },
        "image_transforms": [
            {"type": "diffengine.datasets.Resize", "size": 256},
            {"type": "diffengine.datasets.Flip", "p": 0.0},
            {"type": "diffengine.datasets.Crop", "size": 256, "random": True},
            {"type": "diffengine.datasets.ToTensor"},
        ],
        "transforms": [{"type": "diffengine.datasets.DropCaption", "p": 0.1}],
        "batch_size": 2,
        "num_workers": 4,
        "image_variations": 8,
        "shuffle_tags": False,
        "drop_tags": 0.0,
        "keep_tags": 1,
        "tag_separator": ",",
        "caption_variations": None,
        "unmasked_weight": 0.1,
        "aspect": "keep",
        "max_aspect": 2.0,
    }  # fmt: skip
    assert resolved["default_hooks"]["preview"]["resolution"] == 256
