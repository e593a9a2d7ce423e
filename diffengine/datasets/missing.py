"""Images that a run generates before it trains, and the record of what generated them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffengine.errors import UserError
from diffengine.files import write_text

RECORD = "drawn.json"  # next to the images: which of them a run generated, and from what


@dataclass
class MissingImages:
    """Images that a data set still lacks. The run generates them with the model before it trains.

    Attributes:
        folder: where they go; it need not exist.
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

        Images that the record does not list are the user's own and are used as they are.

        Raises:
            UserError: images there were generated from another prompt, base or options; or the folder cannot be
                written.
        """
        record = self.folder / RECORD
        now = {"prompt": self.prompt, "base": base, "options": self.options}
        try:
            before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
            existing = [name for name in before.get("pictures", []) if (self.folder / name).exists()]
            changed = [
                f"{key} was {before.get(key)!r} and is {value!r}"
                for key, value in now.items()
                if before.get(key) != value
            ]
            if existing and changed:
                raise UserError(
                    f"'{self.folder}' holds {len(existing)} class images that were generated differently: "
                    f"{'; '.join(changed)}; choose another class_data, delete them to generate them again, or delete "
                    f"{RECORD} to keep them"
                )
            if self.numbers:
                self.folder.mkdir(parents=True, exist_ok=True)
                names = [*existing, *(f"{number:06}.png" for number in self.numbers)]
                write_text(record, json.dumps({**now, "pictures": names}, indent=1))
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"cannot keep class images in '{self.folder}': {error}") from error
