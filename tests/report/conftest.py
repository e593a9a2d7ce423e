"""Work dirs as a run leaves them, made without training."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Make = Callable[..., Path]
NASTY = ["a <script>alert(1)</script> & </script> cat", "猫が雪の中にいる", "قطة في الثلج", "{{title}} \u2028 ${x}"]


def lines(count: int, validated: bool = True) -> list[dict[str, Any]]:
    """Log lines of training every 10 steps, and of validation every 100. A line lacks some losses by t."""
    found: list[dict[str, Any]] = []
    for step in range(10, 10 * count + 1, 10):
        loss = 2 + 3.5 * math.exp(-step / (3 * count)) + 0.1 * math.sin(step)
        found.append({
            "iter": step, "epoch": 0, "time": 1.8e9 + step, "loss": loss, "accuracy": 1 / (1 + loss), "lr": 1e-4,
            "grad_norm": 1.5, "images_per_second": 60.123456789, "seconds_per_step": 1.0, "data_wait": 0.01,
            "memory_gb": 1.0, "tokens_per_second": 15391.5, "captions_dropped": 0.1,
            **{f"grad_norm_{group}": 0.5 for group in ("embed", "down_up", "layers", "head")},
            **{f"loss_t{level}": loss - level / 8 for level in range(8) if (step // 10 + level) % 3},
        })  # fmt: skip
        if validated and step % 100 == 0:
            levels = {f"val/loss_t{level}": loss + level / 8 for level in range(8)}
            found.append({
                "iter": step, "time": 1.8e9 + step, "val/loss": loss + 0.2, "val/loss_uncaptioned": loss + 0.9,
                "val/caption_gain": 0.7, "val/accuracy": 0.2, "val/train_loss": loss, **levels,
            })  # fmt: skip
    return found


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make a work dir: `make(name, lines=..., steps=..., prompts=..., side=..., facts=..., settings=...)`."""

    def make_work_dir(
        name: str = "run", *, count: int = 30, steps: int = 3, prompts: list[str] | None = None, side: int = 32,
        facts: dict[str, Any] | None = None, settings: dict[str, Any] | None = None,
    ) -> Path:  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines(count))
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
        known = {
            "name": "amused_512_own",
            "status": "done",
            "step": 10 * count,
            "max_iters": 10 * count,
            "generates": True,
        }
        known |= {
            "references": {"ln 256": 5.545},
            "warnings": [{"step": 20, "text": "captions are ignored"}],
            **(facts or {}),
        }
        (folder / "run.json").write_text(json.dumps(known), encoding="utf-8")
        values = {"batch_size": 4, "learning_rate": 1e-4, **(settings or {})}
        rows = [f"{key} = {value!r}\n" for key, value in values.items()]
        first = "# amused_512_own, as it was trained. Train it again: diffengine train config.py --work-dir DIR\n"
        (folder / "config.py").write_text(first + "".join(rows), encoding="utf-8")
        (folder / "iter_9.pth").write_bytes(b"")
        labels = prompts or ["a cat", "a dog"]
        rng = np.random.default_rng(0)
        for step in range(steps):
            for number in range(len(labels)):
                file = folder / "previews" / f"{10 * step:06}" / f"{number:02}.webp"
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(file, quality=90)
            (folder / "previews" / f"{10 * step:06}.png").write_bytes(b"")
        if steps:
            known_prompts = {"prompts": labels, "steps": [], "from_data": False}
            (folder / "previews" / "prompts.json").write_text(json.dumps(known_prompts), encoding="utf-8")
        return folder

    return make_work_dir
