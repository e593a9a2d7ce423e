"""Images that a run generates before it trains, and the record of what generated them."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffengine.errors import UserError, require
from diffengine.files import read_json, write_text

RECORD = "drawn.json"  # next to the images: which of them a run generated, and from what


@dataclass
class MissingImages:
    """Images that a data set still lacks. The run generates them with the model before it trains.

    Attributes:
        folder: for the images; it need not exist.
        prompt: what to generate.
        numbers: one per image: the seed of its noise, and the number of its file `NNNNNN.png`.
        options: the model's generation options, by name.
    """

    folder: Path
    prompt: str
    numbers: list[int]
    options: dict[str, Any] = field(default_factory=dict)

    def claim(self, base: str) -> None:
        """Record in the folder's `drawn.json` that the model `base` generates the missing images.

        Images that the record does not list are the user's own and are used unchanged.

        Raises:
            UserError: images there came from another prompt, base or options; or the folder cannot be written.
        """
        record = self.folder / RECORD
        now = {"prompt": self.prompt, "base": base, "options": self.options}
        try:
            old = read_json(record) if os.path.lexists(record) else {}
            existing = [name for name in old.get("pictures", []) if (self.folder / name).exists()]
            changed = [f"{key} was {old.get(key)!r} and is {now[key]!r}" for key in now if old.get(key) != now[key]]
            found = f"'{self.folder}' holds {len(existing)} class images that were generated differently"
            advice = f"choose another folder, delete them to generate them again, or delete {RECORD} to keep them"
            require(not (existing and changed), f"{found}: {'; '.join(changed)}; {advice}")
            if self.numbers:
                self.folder.mkdir(parents=True, exist_ok=True)
                names = [*existing, *(f"{number:06}.png" for number in self.numbers)]
                write_text(record, json.dumps({**now, "pictures": names}, indent=1))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"cannot keep class images in '{self.folder}': {error}") from error
