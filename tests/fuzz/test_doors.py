"""No input ends in a traceback: at each door, foreign inputs are taken or refused in one line.

Each case runs in a new process with little time and memory, in a folder where it may change everything.
"""

import multiprocessing
import os
import resource
import shutil
import sys
import unicodedata
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from diffengine import cli
from tests.fuzz import corpus

SECONDS, BYTES = 20, 3 * 2**30  # of a case, beyond what its process starts with
SHARED = ("toy.py", "photos", "model", "run", "tokens")
SUITE, SOAK = 100, 1000  # cases


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, photos, a config, a run and its token cache, which no case may change."""
    root = tmp_path_factory.mktemp("doors")
    before = Path.cwd()
    os.chdir(root)
    try:
        corpus.prepare(root)
    finally:
        os.chdir(before)
    return root


def doors(base: Path) -> dict[str, st.SearchStrategy[tuple[str, corpus.Case]]]:
    """Strategies for named cases, by door: those of the corpus, and random ones."""
    state = corpus.torch.load(base / "run" / "iter_1.pth", weights_only=True)
    known = {
        "config": corpus.CONFIG, "command line": corpus.COMMAND_LINE, "data": corpus.DATA,
        "checkpoint": corpus.checkpoint_cases(state),
        "model folder": corpus.model_cases(base / "model") | corpus.adapter_cases(base / "run" / "transformer"),
        "cache": corpus.cache_cases(base / "tokens"),
        "disk": corpus.DISK,
    }  # fmt: skip
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
    keys = st.sampled_from((*corpus.SETTINGS, *corpus.SECTION_KEYS))
    words = st.text(max_size=20).filter(lambda text: not text.startswith("-"))
    damage, readers = st.binary(min_size=1, max_size=4), st.sampled_from(sorted(corpus.READERS))
    files = corpus.WEIGHT_FILES + corpus.JSON_FILES
    random = {
        "config": st.builds(lambda key, value: (f"{key} = {value!r}", corpus.setting(key, value)), keys, values),
        "command line": st.builds(
            lambda key, text: (f"{key}={text!r}", corpus.option(f"{key}={text}")), keys, words
        )
        | st.builds(
            lambda door, text: (f"{door}: {text!r}", corpus.on_path(corpus.PATHS[door], text)),
            st.sampled_from(sorted(corpus.PATHS)), words,
        ),
        "data": st.builds(lambda content: (f"metadata {content!r}", corpus.metadata(content)), st.binary(max_size=60)),
        "checkpoint": st.builds(corpus.damaged_checkpoint, readers, st.floats(0, 1), damage),
        "model folder": st.builds(corpus.damaged_model, st.sampled_from(files), st.floats(0, 1), damage),
        "cache": st.builds(corpus.damaged_cache, st.integers(0, 99), st.floats(0, 1), damage),
        "disk": st.builds(corpus.limited, st.integers(0, 2**21)),
    }  # fmt: skip
    return {door: st.sampled_from(sorted(cases.items())) | random[door] for door, cases in known.items()}


@pytest.mark.parametrize("count", [SUITE, pytest.param(SOAK, marks=pytest.mark.soak)])
@pytest.mark.parametrize("door", ["config", "command line", "data", "checkpoint", "model folder", "cache", "disk"])
def test_foreign_inputs_are_taken_or_refused_in_one_line(base: Path, tmp_path: Path, door: str, count: int) -> None:
    before = listing(base)

    @settings(
        max_examples=count // 7, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @given(doors(base)[door])
    def check(named: tuple[str, corpus.Case]) -> None:
        name, case = named
        problem = attempt(base, tmp_path / "case", case)
        if listing(base) != before:
            problem += "; changed what was there before"
        assert not problem, f"{door}: {name}: {problem}"

    check()


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of all files."""
    found = sorted(path for path in folder.rglob("*") if not path.is_symlink())
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found if path.is_file()]


def attempt(base: Path, folder: Path, case: corpus.Case) -> str:
    """Run a case in a new folder; what is wrong with how it ended, or ""."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in SHARED:
        (folder / name).symlink_to(base / name)
    ends = [os.pipe() for _ in ("stdout", "stderr")]  # files would have the limits of a full disk
    process = multiprocessing.get_context("fork").Process(target=_run, args=(folder, case, *(end for _, end in ends)))
    process.start()
    with ThreadPool(2) as pool:
        read = pool.starmap_async(_read_all, ends)
        process.join(SECONDS)
        code = process.exitcode
        process.kill()
        process.join()
        out, err = read.get()
    last = err.strip().rpartition("\n")[2][-500:]
    if code not in (0, 2):
        return f"ended with {code}: {last}"
    first, *more = err.rstrip("\n").split("\n")
    several = first.endswith(" problems:") and all(line.startswith("  ") for line in more)
    if code == 2 and not (first.strip() and err.endswith("\n") and (several or not more)):
        return f"not one line: {err[-1500:]!r}"
    if raw := {char for char in out + err if unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t\r"}:
        return f"raw {raw} in the output: {last!r}"
    return "code was executed" if (folder / "executed").exists() else ""


def _read_all(reading: int, writing: int) -> str:
    """What a process writes to a pipe until it ends."""
    os.close(writing)
    with os.fdopen(reading, errors="replace") as file:
        return file.read()


def _run(folder: Path, case: corpus.Case, stdout: int, stderr: int) -> None:
    """Be the process of a case."""
    os.chdir(folder)
    sys.path.insert(0, "")
    argv = case()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.closerange(3, stderr + 1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    cli.quiet_libraries()
    code = cli.main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
