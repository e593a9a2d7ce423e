"""Train images of three shapes with aspect="keep" and as square crops, and compare what the two models generate.

    python tools/emoji_shapes.py [--work-dir work_dirs/emoji_shapes]

One emoji, two side by side ("cat left of dog"), and two one above the other ("cat above dog"): a quarter of the pairs
is not trained. Both models are asked for every caption in the shape of its image. A generated image counts if, among
the images of its shape, the one with its own caption is the nearest in pixels. Needs `diffengine train vq_32_emoji`.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from diffengine import api, cli
from diffengine.datasets import EmojiDataset
from diffengine.evaluation import Gallery
from diffengine.evaluation.retrieval import rate
from diffengine.grids import grid, save_image, stack
from diffengine.models.generation import GenerationOptions, ImageRequest

EMOJI = 16
SHAPES = {"side by side": (64, 32), "one above the other": (32, 64), "alone": (48, 48)}


def images() -> Iterator[tuple[str, str, Image.Image, bool]]:
    """(shape, caption, image, whether it is trained)."""
    small, large = (EmojiDataset(count=EMOJI, backgrounds=None, size=size) for size in (32, 48))
    names = [small[index]["text"] for index in range(EMOJI)]
    for index, name in enumerate(names):
        yield "alone", name, large[index]["image"], True
    for shape, words, offset in (("side by side", "left of", (32, 0)), ("one above the other", "above", (0, 32))):
        for one in range(EMOJI):
            for other in range(EMOJI):
                if one != other:
                    image = Image.new("RGB", SHAPES[shape])
                    image.paste(small[one]["image"], (0, 0))
                    image.paste(small[other]["image"], offset)
                    yield shape, f"{names[one]} {words} {names[other]}", image, (one + 2 * other) % 4 != 0


def write(folder: Path) -> None:
    """The trained images, with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (_, caption, image, trained) in enumerate(images()):
        if trained:
            image.save(folder / f"{number:04}.png")
            (folder / f"{number:04}.txt").write_text(caption)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/emoji_shapes"))
    root = parser.parse_args().work_dir
    write(root / "data")
    generated: dict[str, list[Image.Image]] = {}
    known = list(images())
    requests = [ImageRequest(caption, 0, size=SHAPES[shape]) for shape, caption, _, _ in known]
    for aspect in ("keep", "square"):
        work_dir = root / aspect
        options = ["--cfg-options", f"aspect={aspect}", f"data={root / 'data'}"]
        if not (work_dir / "report.html").exists():
            code = cli.main(["train", "amused_emoji_shapes", "--work-dir", str(work_dir), "--overwrite", *options])
            assert code == 0
        sampler = api.load_sampler(work_dir)
        generated[aspect] = list(sampler.generate(requests, GenerationOptions(1.0)))
    generated["VQ model"] = list(sampler.reconstruct([image for _, _, image, _ in known]))
    print(f"\n| images | {' | '.join(generated)} |\n|---|{'---|' * len(generated)}")
    for shape in SHAPES:
        of_shape = [(caption, image) for own, caption, image, _ in known if own == shape]
        gallery = Gallery([caption for caption, _ in of_shape], [image for _, image in of_shape])
        for seen in (True, False):
            rows = [index for index, (own, _, _, trained) in enumerate(known) if own == shape and trained == seen]
            captions = [known[index][1] for index in rows]
            if rows:
                found = [rate(gallery.ranks([made[index] for index in rows], captions), 1)[0]
                         for made in generated.values()]  # fmt: skip
                label = f"{shape}, {'trained' if seen else 'not trained'} ({len(rows)})"
                print(f"| {label} | {' | '.join(f'{share:.3f}' for share in found)} |")
    save_image(compared(generated), root / "emoji-shapes.png")
    print(f"\n{root / 'emoji-shapes.png'}")


def compared(generated: dict[str, list[Image.Image]]) -> Image.Image:
    """A few images of each shape: the original, and what either model generates from its caption."""
    known = list(images())
    rows = []
    for shape, (width, height) in SHAPES.items():
        of_shape = [index for index, (own, *_) in enumerate(known) if own == shape]
        chosen = of_shape[:: len(of_shape) // 7][:7]
        for label, made in (("data", [image for _, _, image, _ in known]), *list(generated.items())[:2]):
            large = [made[index].resize((2 * width, 2 * height), Image.Resampling.NEAREST) for index in chosen]
            cells = [(known[index][1] if label == "square" else "", image) for index, image in zip(chosen, large)]
            rows.append((f"{shape}: {label}", grid(cells, columns=7, smallest=1)))
    return stack(rows)


if __name__ == "__main__":
    main()
