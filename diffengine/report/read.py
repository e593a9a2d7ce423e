"""What a work dir says about its run. Nothing in it is executed, and any file may be missing or cut off."""

import ast
import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any, final

from diffengine import config
from diffengine.config import PLAIN, SECTIONS, Plain
from diffengine.errors import UserError, require
from diffengine.files import LARGEST_JSON, expanded, locked, read_foreign, write_text
from diffengine.signatures import Between, children, fits
from diffengine.text import printable

Line = dict[str, float | None]  # one line of metrics.jsonl
RECENT = 40  # log lines that the time left is taken from
LARGEST = 1e300  # number of a line
MOST_POINTS = 3000  # of a curve; longer ones are averaged
MOST_CURVES = 1000
LARGEST_LINES = 2**30  # bytes of metrics.jsonl
COUNT = Annotated[int, Between(0, 2**53)]
# What `run.json` holds by type; what has another is left out.
FACTS = {
    **dict.fromkeys(("step", "max_iters", "processes"), COUNT),
    **dict.fromkeys(("started", "updated", "seconds", "seconds_left"), float),
    **dict.fromkeys(("name", "status", "error"), str),
    **dict.fromkeys(("data", "environment", "memory", "references"), dict),
    "generates": bool,
    "warnings": list[dict],
}


@final
@dataclass(frozen=True)
class RunFiles:
    """A run, as its files describe it.

    Attributes:
        folder: the work dir.
        facts: `run.json`, {} for a run that wrote none.
        lines: `metrics.jsonl`.
        damaged: how many of its lines could not be read.
        config: `config.py` as plain data, {} if it cannot be read.
        name: of the config.
    """

    folder: Path
    facts: dict[str, Any]
    lines: list[Line]
    damaged: int
    config: Plain
    name: str

    @property
    def step(self) -> int:
        """The last step that a file knows of."""
        return max([self.facts.get("step", 0), *(int(line["iter"] or 0) for line in self.lines)])

    @property
    def max_iters(self) -> int | None:
        """The steps of the whole run; None if no file says so."""
        known = self.facts.get("max_iters", self.config.get("max_iters"))
        return known if isinstance(known, int) else None

    @property
    def status(self) -> str:
        """running, done, stopped, diverged or failed; of an older version's run, what its files suggest."""
        if "status" not in self.facts:
            if self.max_iters is not None:
                return "done" if self.step >= self.max_iters else "stopped"
            return "done" if (self.folder / "before_after.png").exists() else "stopped"
        status = str(self.facts["status"])
        return "stopped" if status == "running" and not _in_use(self.folder) else status

    @property
    def warnings(self) -> list[dict[str, Any]]:
        """{"step", "text"} of each: of the run, and of its files."""
        found = list(self.facts.get("warnings") or [])
        return [*found, {"step": self.step, "text": damage(self.damaged)}] if self.damaged else found

    @property
    def seconds_left(self) -> float | None:
        """By the pace between the log lines, else as `run.json` has it; None if the run has ended."""
        if self.status != "running" or self.max_iters is None:
            return None
        timed = [(line["time"], line["iter"]) for line in self.lines[-RECENT:] if line.get("time")]
        paces = [
            (now - before) / (end - start)  # type: ignore[operator]
            for (before, start), (now, end) in pairwise(timed)
            if end > start  # type: ignore[operator]
        ]
        if paces:  # the median: a run that was resumed has a gap
            return median(paces) * max(0, self.max_iters - self.step)
        return self.facts.get("seconds_left")

    def columns(self, prefix: str) -> dict[str, list[float | None]]:
        """Values by metric, with `iter`: of validation lines for the prefix "val/", of training lines for ""."""
        lines = [line for line in self.lines if any(key.startswith(prefix or "loss") for key in line)]
        own = [{key: value for key, value in line.items() if key.startswith("val/") == bool(prefix)} for line in lines]
        for line, whole in zip(own, lines):
            line["iter"] = whole["iter"]
        keys = list(dict.fromkeys(key for line in own for key in line))[:MOST_CURVES]
        return {key: [_short(mean) for mean in _thinned([line.get(key) for line in own])] for key in keys}

    @property
    def preview_steps(self) -> list[int]:
        """The steps that have previews, rising; a resumed run has yet to replace later ones."""
        found = sorted(int(path.stem) for path in self._previews("*.png") if path.stem.isdecimal())
        newest = self.step or math.inf  # 0: no file says how far the run is
        return [step for step in found if step <= newest]

    def preview_files(self, step: int) -> list[Path]:
        """The single images of a step; [] for a run that wrote only grids."""
        return sorted(self._previews(f"{step:06}/*.webp"))

    def grid_file(self, step: int) -> Path:
        """All images of a step in one."""
        return self.folder / "previews" / f"{step:06}.png"

    def source_files(self, name: str) -> list[Path]:
        """What belongs to prompts from the data: the images that were "original", or their "round_trip"."""
        return sorted(self._previews(f"{name}/*.webp"))

    @property
    def prompts(self) -> dict[str, Any]:
        """previews/prompts.json: "prompts" and, after them, generation "steps", by image."""
        found = _read_json(self.folder / "previews" / "prompts.json")
        return {key: [str(each) for _, each in children(found.get(key))] for key in ("prompts", "steps")}

    def _previews(self, pattern: str) -> Iterator[Path]:
        return (self.folder / "previews").glob(pattern)

    @property
    def commands(self) -> dict[str, str]:
        """Exact commands by what they do, from where the run was started."""
        model = self.config.get("model")
        by_config = isinstance(model, dict) and str(model.get("type")).endswith("AmusedModel")
        generates = self.facts.get("generates", by_config)
        prompts = self.prompts["prompts"]
        prompt = prompts[0] if prompts else "a prompt of your own"
        found = commands(self.folder, generates, prompt, self.facts.get("processes", 1))
        if self.status == "done":
            del found["resume"]
        if (self.folder / "best.pth").exists():
            found["convert the best"] = f"{found['convert']} --best"
        if not any(self.folder.glob("*.pth")):
            return {key: command for key, command in found.items() if key == "resume"}
        return found

    def config_rows(self) -> list[dict[str, Any]]:
        """Each value of the config: {"key", "value", "changed"}, and "shipped" where the shipped one differs."""
        if not self.config:
            return []
        own = leaves(self.config)
        if self.name not in config.shipped():
            return [{"key": key, "value": value, "changed": False} for key, value in own.items()]
        base = leaves({**PLAIN, **config.read(self.name)})
        rows = []
        for key, value in own.items():
            row: dict[str, Any] = {"key": key, "value": value, "changed": base.get(key) != value and key != "work_dir"}
            if row["changed"]:
                row["shipped"] = base.get(key, "not set")
            rows.append(row)
        return rows


def read_run(folder: str | Path) -> RunFiles:
    """Read a run's files.

    Raises:
        UserError: the folder does not exist, or no run wrote anything there.
    """
    path = expanded(folder)
    require(path.is_dir(), f"work dir '{path}' does not exist" if not path.exists() else f"'{path}' is not a folder")
    known = any((path / name).is_file() for name in ("run.json", "metrics.jsonl", "config.py"))
    require(known, f"'{path}' holds no run: it has neither run.json nor metrics.jsonl nor config.py")
    found = _read_json(path / "run.json")
    facts = {key: value for key, value in found.items() if key not in FACTS or fits(value, FACTS[key])}
    values, title = read_config(path / "config.py")
    name = printable(facts.get("name") or title or path.resolve().name)
    return RunFiles(path, facts, *read_lines(path / "metrics.jsonl"), values, name)


def read_lines(file: Path) -> tuple[list[Line], int]:
    """(the lines of metrics.jsonl by step, how many others are damaged). What is no finite number becomes None."""
    rows = [row for row in _read(file, LARGEST_LINES).split(b"\n") if row.strip()]
    lines = [line for line in map(_line, rows) if line]
    return sorted(lines, key=lambda line: line["iter"] or 0), len(rows) - len(lines)


def _line(row: bytes) -> Line | None:
    """A line of metrics.jsonl; None if it is cut off, no object of JSON, or without a step."""
    try:
        line = json.loads(row.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("iter")) is not int or not 0 <= line["iter"] < 2**53:
        return None
    return {key: _number(value) for key, value in line.items()}


def drop_damaged_lines(file: Path) -> int:
    """Rewrite metrics.jsonl without damaged lines, if it has any; how many these were."""
    lines, damaged = read_lines(file)
    if damaged:
        write_text(file, "".join(json.dumps(line) + "\n" for line in lines))
    return damaged


def damage(lines: int) -> str:
    """The warning that so many lines are damaged."""
    return f"metrics.jsonl is damaged: {lines} {'line was' if lines == 1 else 'lines were'} left out"


def read_config(file: Path) -> tuple[Plain, str]:
    """(a work dir's config.py as plain data, the config's name by its first line). Only literals are taken."""
    text = _read_text(file)
    first = text.partition("\n")[0]
    name = first[2:].partition(", as it was trained")[0] if ", as it was trained" in first else ""
    values: Plain = {}
    try:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                values[node.targets[0].id] = ast.literal_eval(node.value)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return {}, name
    return values, name


def commands(folder: Path, generates: bool, prompt: str, processes: int = 1) -> dict[str, str]:
    """The commands that resume a run, sample from it and convert it, ready to paste into a shell."""
    path = shlex.quote(str(folder))
    started = f"NPROC_PER_NODE={processes} " if processes > 1 else ""
    config_file = shlex.quote(str(folder / "config.py"))
    found = {"resume": f"{started}diffengine train {config_file} --work-dir {path} --resume"}
    if generates:
        found["sample"] = f"diffengine sample {path} {shlex.quote(prompt)}"
    found["convert"] = f"diffengine convert {path}{' --pipeline' if generates else ''}"
    return found


def leaves(values: Any, path: str = "") -> dict[str, str]:
    """The values of a config as Python would write them, by dotted path; settings come first."""
    if path == "":
        values = {key: values[key] for key in sorted(values, key=lambda key: key in SECTIONS)}
    if isinstance(values, list) and any(isinstance(item, dict) for item in values):
        values = {str(index): item for index, item in enumerate(values)}
    if isinstance(values, dict) and values:
        return {name: leaf for key, value in values.items() for name, leaf in leaves(value, f"{path}.{key}").items()}
    return {path[1:]: repr(values)}


def differences(runs: list[RunFiles]) -> list[dict[str, Any]]:
    """What differs between configs: {"key", "values" (one per run, "not set" where it is absent)}."""
    each = [leaves(run.config) for run in runs]
    keys = dict.fromkeys(key for one in each for key in one)
    rows = [{"key": key, "values": [one.get(key, "not set") for one in each]} for key in keys]
    return [row for row in rows if len(set(row["values"])) > 1 and row["key"] != "work_dir"]


def _in_use(folder: Path) -> bool:
    """Whether a process trains in the folder; True if that cannot be found out."""
    try:
        with locked(folder):
            return False
    except OSError:  # BlockingIOError is one
        return True


def _read(file: Path, most: int = LARGEST_JSON) -> bytes:
    """A file's content, b"" if there is none."""
    return read_foreign(file, most) if file.exists() else b""


def _read_text(file: Path) -> str:
    """A file's text, "" if there is none. What is not UTF-8 is replaced."""
    return _read(file).decode("utf-8", "replace")


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON file's object of plain values; {} if there is none, or if it is damaged."""
    text = _read_text(file) or "{}"
    try:
        found = config.plain(json.loads(text), f"'{file}'")
    except (UserError, ValueError, RecursionError):  # not plain, not JSON, or nested too deep to be read
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> float | None:
    return value if type(value) in (int, float) and abs(value) <= LARGEST else None


def _short(value: float | None) -> float | None:
    """Six digits, which is more than a curve shows."""
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")


def _thinned(values: list[float | None]) -> list[float | None]:
    """At most `MOST_POINTS` values, as means of equally many; None where all of these are None."""
    size = math.ceil(len(values) / MOST_POINTS)
    if size <= 1:
        return values
    groups = [[value for value in values[at : at + size] if value is not None] for at in range(0, len(values), size)]
    return [sum(group) / len(group) if group else None for group in groups]
