"""The page and what it is made of: damaged files, escaping, size, several runs, old runs, and the command."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from diffengine import cli
from diffengine.errors import UserError
from diffengine.files import locked
from diffengine.report import build_page, commands, read_run
from diffengine.report.page import embed, spread_steps
from diffengine.report.read import drop_damaged_lines
from tests.report.conftest import NASTY, Make

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v0.1.0" / "work_dirs" / "tiny"
MEGABYTE = 1_000_000


def data_of(page: str) -> dict[str, Any]:
    """The data inside a page, found as a browser finds it."""

    class Scripts(HTMLParser):
        found = ""
        inside = False

        def handle_starttag(self, tag: str, attrs: list) -> None:
            self.inside = tag == "script" and ("id", "data") in attrs

        def handle_endtag(self, tag: str) -> None:
            self.inside = False

        def handle_data(self, data: str) -> None:
            self.found += data if self.inside else ""

    parser = Scripts()
    parser.feed(page)
    return json.loads(parser.found)


def the_run(folder: Path) -> dict[str, Any]:
    return data_of(build_page([read_run(folder)]))["runs"][0]


def test_what_the_page_holds(make: Make) -> None:
    run = the_run(make(settings={"batch_size": 5}))
    assert (run["name"], run["status"], run["step"], run["max_iters"]) == ("amused_512_own", "done", 300, 300)
    assert run["train"]["iter"] == list(range(10, 301, 10))
    assert run["train"]["images_per_second"][0] == 60.1235  # six digits
    assert not [key for key in run["train"] if key.startswith("val/")]
    assert run["val"]["iter"] == [100, 200, 300]
    assert len([key for key in run["val"] if key.startswith("val/loss_t")]) == 8
    assert run["references"] == {"ln 256": 5.545}
    assert run["warnings"] == [{"step": 20, "text": "captions are ignored"}]
    assert run["previews"]["steps"] == [0, 10, 20]
    assert run["previews"]["prompts"] == ["a cat", "a dog"]
    assert all(image.startswith("data:image/webp;base64,") for row in run["previews"]["images"] for image in row)
    changed = {row["key"]: row for row in run["config"] if row["changed"]}
    assert changed["batch_size"]["value"] == "5"
    assert changed["batch_size"]["shipped"] != "5"


DAMAGE = [
    b'{"iter": 60, "lo', b"\0" * 64, b'{"iter": 60, "loss": \xff\xfe}', b"[1]", b"7", b"null", b'{"loss": 2}',
    b'{"iter": "60"}', b'{"iter": true}', b'{"iter": 6.5}', b'{"iter": -1}', b'{"iter": NaN}', b'{"iter": 1e999}',
    b'{"iter": ' + b"9" * 400 + b"}", b"[" * 10_000,
]  # fmt: skip


def test_damaged_lines_are_left_out_and_counted(make: Make) -> None:
    folder = make(count=3)
    values = [b"null", b'"x"', b"NaN", b"-Infinity", b"[]", b"true", b"9" * 400]
    odd = [b'{"iter": %d, "loss": %s, "time": {}}' % (40 + index, value) for index, value in enumerate(values)]
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\n\n".join([*odd, *DAMAGE]))
    run = the_run(folder)
    assert run["train"]["iter"] == [10, 20, 30, 40, 41, 42, 43, 44, 45, 46]
    assert run["train"]["loss"][3:] == [None] * 7
    assert run["train"]["lr"][-1] is None
    assert run["warnings"][-1]["text"] == f"metrics.jsonl is damaged: {len(DAMAGE)} lines were left out"


def test_damaged_lines_are_dropped_once(make: Make) -> None:
    file = make(count=3) / "metrics.jsonl"
    whole = file.read_bytes()
    assert drop_damaged_lines(file) == 0
    assert file.read_bytes() == whole
    file.write_bytes(DAMAGE[1] + b"\n" + whole + DAMAGE[0])
    assert drop_damaged_lines(file) == 2
    assert file.read_bytes() == whole


@pytest.mark.parametrize("missing", ["run.json", "metrics.jsonl", "config.py", "previews", "iter_9.pth"])
def test_any_file_may_be_missing(make: Make, missing: str) -> None:
    folder = make()
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    run = the_run(folder)
    assert run["name"] == "amused_512_own"
    expected = {
        "run.json": {"resume", "convert"},
        "iter_9.pth": set(),
    }  # without run.json it nothing says that it is done
    assert set(run["commands"]) == expected.get(missing, {"sample", "convert"})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 3', "[" * 10**5, '{"a": ' + "[" * 900 + "]" * 900 + "}",
                                  '{"step": NaN}', '{"step": 1e999}', '{"name": "\\ud800"}'])  # fmt: skip
def test_damaged_json(make: Make, text: str) -> None:
    folder = make()
    (folder / "run.json").write_text(text)
    (folder / "previews" / "prompts.json").write_text(text)
    (folder / "config.py").write_text("batch_size = open('x')\n")
    assert the_run(folder)["config"] == []


@pytest.mark.parametrize("odd", [5, "x", [1], None, {"thumbnails": 5}, -1])
def test_facts_of_another_type_are_left_out(make: Make, odd: Any) -> None:
    folder = make()
    facts = json.loads((folder / "run.json").read_text())
    expected = the_run(folder)
    (folder / "run.json").write_text(json.dumps({**dict.fromkeys(facts, odd), "status": "done"}))
    (folder / "previews" / "prompts.json").write_text(json.dumps({"prompts": odd, "steps": odd}))
    found = the_run(folder)
    assert (found["status"], found["train"]) == ("done", expected["train"])
    assert type(found["step"]) is int


@pytest.mark.parametrize("text", ["a = {[1]: 2}", "a = " + "9" * 5000, "a = " + "[" * 5000, "a = 1\0"])
def test_a_config_that_is_no_python(make: Make, text: str) -> None:
    folder = make()
    (folder / "config.py").write_text(text)
    assert the_run(folder)["config"] == []


@pytest.mark.parametrize("name", ["run.json", "config.py", "metrics.jsonl", "previews/prompts.json"])
def test_a_pipe_is_not_waited_for(make: Make, name: str) -> None:
    folder = make()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"{name}' cannot be read: it is no regular file"):
        build_page([read_run(folder)])


def test_curves_are_few(make: Make) -> None:
    lines = "".join(json.dumps({"iter": step, f"loss{step}": 1}) + "\n" for step in range(3000))
    folder = make()
    (folder / "metrics.jsonl").write_text(lines)
    assert len(the_run(folder)["train"]) == 1000


def test_nothing_in_a_work_dir_is_executed(make: Make, tmp_path: Path) -> None:
    folder = make()
    (folder / "config.py").write_text(f"x = 1\n__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()\n")
    assert [row["key"] for row in the_run(folder)["config"]] == ["x"]
    assert not (tmp_path / "ran").exists()


def test_only_thumbnails_of_the_report_folder_are_read(make: Make, tmp_path: Path) -> None:
    (tmp_path / "secret.webp").write_bytes(b"secret")
    thumbnails = [
        {"file": "../../secret.webp", "caption": "x"},
        {"file": str(tmp_path / "secret.webp"), "caption": "y"},
    ]
    assert the_run(make(facts={"data": {"images": 2, "thumbnails": thumbnails}}))["data"]["thumbnails"] == []


def test_captions_stay_text(make: Make) -> None:
    page = build_page([read_run(make(prompts=NASTY, facts={"name": NASTY[0]}))])
    assert data_of(page)["runs"][0]["previews"]["prompts"] == NASTY
    assert page.count("<script") == 3
    assert page.count("</script>") == 3
    assert "<title>a &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert json.loads(embed(["</script><!--\u2028&", "\ud800"])) == ["</script><!--\u2028&", "?"]
    script = (Path(sys.modules["diffengine.report.page"].__file__).parent / "static" / "page.js").read_text()  # type: ignore[arg-type]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)


def test_the_page_names_no_address() -> None:
    """The browser test counts requests; this one needs no browser."""
    page = build_page([read_run(FIXTURE)])
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


@pytest.mark.soak
def test_at_most_three_megabytes(make: Make) -> None:
    folder = make(count=1000, steps=20, prompts=[f"prompt {number}" for number in range(8)], side=512)
    page = build_page([read_run(folder)])
    assert len(page.encode()) < 3 * MEGABYTE
    run = data_of(page)["runs"][0]
    assert len(run["previews"]["steps"]) == 20
    assert all(all(row) for row in run["previews"]["images"])
    assert len(run["train"]["loss"]) == 1000


def test_a_long_run_is_thinned(make: Make) -> None:
    run = the_run(make(count=10_000, steps=300))
    assert len(run["train"]["loss"]) <= 3000
    assert len(run["train"]["iter"]) == len(run["train"]["loss"])
    assert 200 <= len(run["previews"]["steps"]) <= 240
    assert run["previews"]["steps"][-1] == 2990
    assert spread_steps(list(range(10)), 3) == [0, 4, 9]


def test_two_runs_side_by_side(make: Make) -> None:
    one, other = make("one"), make("other", settings={"batch_size": 8, "extra": "x"})
    data = data_of(build_page([read_run(one), read_run(other)]))
    assert [Path(run["folder"]).name for run in data["runs"]] == ["one", "other"]
    assert data["differences"] == [
        {"key": "batch_size", "values": ["4", "8"]}, {"key": "extra", "values": ["not set", "'x'"]},
    ]  # fmt: skip


def test_a_run_of_version_0_1_0(tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURE, tmp_path / "tiny")
    run = the_run(folder)
    assert (run["name"], run["status"], run["step"], run["max_iters"]) == ("tiny", "done", 4, 4)
    assert run["train"]["iter"] == [1, 2, 4]
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").stat().st_size < MEGABYTE


def test_a_run_whose_process_died_is_not_running(make: Make) -> None:
    folder = make(facts={"status": "running", "max_iters": 600})
    run = the_run(folder)
    assert (run["status"], run["seconds_left"]) == ("stopped", None)
    assert set(run["commands"]) == {"resume", "sample", "convert"}
    with locked(folder):
        run = the_run(folder)
        assert (run["status"], run["seconds_left"]) == ("running", pytest.approx(300))


def test_the_best_checkpoint_can_be_converted(make: Make) -> None:
    folder = make()
    (folder / "best.pth").write_bytes(b"")
    assert the_run(folder)["commands"]["convert the best"] == f"diffengine convert {folder} --pipeline --best"


def test_the_time_left_ignores_a_night(make: Make) -> None:
    folder = make(facts={"status": "running", "max_iters": 600})
    text = (folder / "metrics.jsonl").read_text().splitlines()
    later = [{**json.loads(line), "time": 3e9 + json.loads(line)["iter"]} for line in text[20:]]
    (folder / "metrics.jsonl").write_text("\n".join([*text[:20], *map(json.dumps, later)]))
    with locked(folder):
        assert the_run(folder)["seconds_left"] == pytest.approx(300)


def test_commands_can_be_pasted() -> None:
    found = commands(Path("my runs/a"), True, "it's a <cat>", 8)
    assert found == {
        "resume": "NPROC_PER_NODE=8 diffengine train 'my runs/a/config.py' --work-dir 'my runs/a' --resume",
        "sample": "diffengine sample 'my runs/a' 'it'\"'\"'s a <cat>'",
        "convert": "diffengine convert 'my runs/a' --pipeline",
    }
    assert commands(Path("vq"), False, "")["convert"] == "diffengine convert vq"


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["absent"], "work dir 'absent' does not exist"),
        (["file.txt"], "'file.txt' is not a folder"),
        (["empty"], "'empty' holds no run: it has neither run.json nor metrics.jsonl nor config.py"),
        (["run", "run/"], "got the same work dir twice"),
        (["run", "-o", "page.pdf"], "--output got 'page.pdf'; expected a file name that ends in .html"),
        (["run", "-o", "absent/page.html"], "cannot write 'absent/page.html': No such file or directory"),
    ],
)
def test_mistakes(
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    argv: list[str],
    text: str,
) -> None:
    make()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert text in error


def test_the_command_loads_neither_torch_nor_diffusers(make: Make) -> None:
    program = (
        "import sys, diffengine.cli as cli\n"
        f"assert cli.main(['report', {str(make())!r}]) == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'mmengine', 'datasets', 'numpy'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_read_run_wants_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        read_run(tmp_path)


def test_a_link_is_not_written_through(make: Make, tmp_path: Path) -> None:
    folder, other = make(), tmp_path / "other.txt"
    other.write_text("mine")
    (folder / ".report.html.tmp").symlink_to(other)
    assert cli.main(["report", str(folder)]) == 0
    assert other.read_text() == "mine"


def test_damaged_rows_of_sources_are_left_out(make: Make) -> None:
    row = {"name": "a", "path": "b", "images": 1, "trained": 1, "repeats": "balance", "samples": 4, "weight": 2}
    damaged = [
        {**row, "images": "x"},
        {**row, "trained": -1},
        {key: row[key] for key in ("name", "path")},
        [],
        "a",
        None,
    ]
    facts = {"data": {"images": 3, "sources": [*damaged, row]}}
    assert the_run(make("one", facts=facts))["data"]["sources"] == [row]
    for number, sources in enumerate(("x", {"a": 1}, 7, None, damaged)):
        folder = make(f"other{number}", facts={"data": {"images": 3, "sources": sources}})
        assert "sources" not in the_run(folder)["data"]
