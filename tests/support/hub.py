"""A Hugging Face cache built from local files, so that hub names work unchanged without a network."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import DatasetInfo, Features, Image, SplitDict, SplitInfo, Value
from datasets.arrow_writer import ArrowWriter
from datasets.naming import camelcase_to_snakecase

from .photos import captioned_photos

Row = Mapping[str, Any]


def _revision(name: str) -> str:
    """40 hex digits, like a commit hash."""
    return hashlib.sha1(name.encode()).hexdigest()


def photo_rows(n: int | None = None, size: int | None = None) -> list[dict[str, Any]]:
    """Rows with columns image (PIL) and text, as in the captioned data sets on the hub."""
    return [{"image": image, "text": caption} for _, image, caption in captioned_photos(n, size)]


def _add_model(hub: Path, name: str, folder: Path) -> None:
    """Adds hub/models--OWNER--NAME/{refs/main, snapshots/REVISION/...}, linked as in a real cache."""
    revision = _revision(name)
    model = hub / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder.resolve(), model / "snapshots" / revision, copy_function=os.symlink)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)  # no trailing newline: readers do not strip it


def _add_dataset(cache: Path, name: str, rows: Iterable[Row]) -> None:
    """Adds cache/OWNER___NAME/default/0.0.0/REVISION/{dataset_info.json, NAME-train.arrow}, with one split."""
    owner, short = name.split("/")
    short = camelcase_to_snakecase(short)  # the name that the reader expects
    folder = cache / f"{owner}___{short}" / "default" / "0.0.0" / _revision(name)
    folder.mkdir(parents=True)
    features = Features({"image": Image(), "text": Value("string")})
    with ArrowWriter(features=features, path=str(folder / f"{short}-train.arrow")) as writer:
        for row in rows:
            writer.write(features.encode_example(dict(row)))
        examples, size = writer.finalize()
    split = SplitInfo("train", size, examples, dataset_name=short)
    DatasetInfo(
        features=features,
        builder_name="parquet",
        dataset_name=short,
        config_name="default",
        version="0.0.0",
        splits=SplitDict({"train": split}, dataset_name=short),
        dataset_size=size,
    ).write_to_directory(str(folder))


def make_hub_cache(
    root: str | Path,
    *,
    models: Mapping[str, str | Path] | None = None,
    datasets: Mapping[str, Iterable[Row]] | None = None,
) -> dict[str, str]:
    """Builds a cache under root; returns the environment variables that point a process to it.

    models: hub name -> local model folder. The cache links to the folder, so do not delete it. datasets: hub name ->
    rows of image (PIL) and text, all in the split "train". Call it again with the same root to add more.

    The libraries read these variables once, at import: pass them to a *child*
    (`subprocess.run(..., env={**os.environ, **variables})`). Setting them in a running test has no effect.
    """
    root = Path(root).resolve()
    for name, folder in (models or {}).items():
        _add_model(root / "hub", name, Path(folder))
    for name, rows in (datasets or {}).items():
        _add_dataset(root / "datasets", name, rows)
    return {
        "HF_HOME": str(root),
        "HF_HUB_CACHE": str(root / "hub"),
        "HF_DATASETS_CACHE": str(root / "datasets"),
        "HF_HUB_OFFLINE": "1",
    }
