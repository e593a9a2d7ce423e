"""Folders of images, read by ImageTextDataset."""

import json
import os

import pytest
from PIL import Image

from diffengine.datasets import ImageTextDataset, Stream, UnreadableImage, as_list
from diffengine.errors import UserError
from tests.support.photos import all_captions


def image(file, shade=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), (shade, 0, 0)).save(file)
    return file


def shades(dataset):
    """The red value of each image, which identifies it."""
    return [dataset[index]["image"].getpixel((0, 0))[0] for index in range(len(dataset))]


def assert_error(match, *arguments, **options):
    with pytest.raises(UserError, match=match) as caught:
        ImageTextDataset(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_text_files_next_to_images_in_sorted_subfolders(tmp_path):
    for number, name in enumerate(["b.png", "a/z.png", "a/y.JPG", "c.webp"]):
        file = image(tmp_path / name, number)
        file.with_suffix(".txt").write_text(f" {name}\n")
    dataset = ImageTextDataset(str(tmp_path))
    assert all_captions(dataset) == ["a/y.JPG", "a/z.png", "b.png", "c.webp"]
    assert shades(dataset) == [pytest.approx(2, abs=3), 1, 0, pytest.approx(3, abs=3)]
    assert dataset.size(0) == (3, 2)


def test_hidden_and_resource_files_are_ignored(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"resource fork")
    image(tmp_path / ".cache" / "b.png")
    image(tmp_path / "__MACOSX" / "c.png")
    assert len(ImageTextDataset(str(tmp_path), caption="x")) == 1


@pytest.mark.parametrize("byte_order_mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_metadata_csv_in_any_script(tmp_path, byte_order_mark, line_end):
    captions = ["赤い狐", "fox, with a comma", "a line\u2028separator", "two\nlines", "лиса 🦊", ""]
    for number in range(len(captions)):
        image(tmp_path / f"{number}.png", number)
    lines = ["file_name,text"] + [f'{number}.png,"{text}"' for number, text in enumerate(captions)]
    lines[3] = f"2.png,{captions[2]}"  # unquoted: str.splitlines would split it
    (tmp_path / "metadata.csv").write_bytes(byte_order_mark + line_end.join(lines).encode())
    assert all_captions(ImageTextDataset(str(tmp_path))) == captions


def test_metadata_paths_are_relative_to_the_metadata_file(tmp_path):
    image(tmp_path / "one" / "a.png", 1)
    image(tmp_path / "two" / "deep" / "a.png", 2)
    image(tmp_path / "top.png", 3)
    (tmp_path / "one" / "metadata.csv").write_text("caption,file_name\nfirst,a.png\n")
    (tmp_path / "two" / "metadata.jsonl").write_text(json.dumps({"file_name": "deep/a.png", "text": "second"}) + "\n")
    (tmp_path / "metadata.csv").write_text("file_name,prompt\ntop.png,third\n")
    dataset = ImageTextDataset(str(tmp_path))
    assert all_captions(dataset) == ["first", "third", "second"]
    assert shades(dataset) == [1, 3, 2]
    indirect = ImageTextDataset(str(tmp_path / "one" / ".." / "one"))
    assert all_captions(indirect) == ["first"]


def test_lists_of_captions_and_several_rows_per_image(tmp_path):
    image(tmp_path / "a.png")
    image(tmp_path / "b.png")
    rows = [{"file_name": "b.png", "text": "one"}, {"file_name": "a.png", "text": ["two", "three"]}]
    rows.append({"file_name": "b.png", "text": "four"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = ImageTextDataset(str(tmp_path), prefix="my ")
    assert [dataset[index]["text"] for index in range(3)] == [["my two", "my three"], ["my one"], ["my four"]]
    assert all_captions(dataset) == ["my two", "my three", "my one", "my four"]


def test_metadata_columns_can_be_chosen(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("image,text,title\na.png,long,short\n")
    dataset = ImageTextDataset(str(tmp_path), image_column="image", caption_column="title")
    assert all_captions(dataset) == ["short"]
    assert_error(
        "has no column 'file_name'; it has image, text, title; set --cfg-options image_column=NAME", str(tmp_path)
    )
    options = {"image_column": "image", "caption_column": "txt"}
    assert_error(
        "no column 'txt'; it has image, text, title; set --cfg-options caption_column=NAME", str(tmp_path), **options
    )


def test_one_caption_for_all_or_the_file_names(tmp_path):
    for name in ("red_fox.png", "blue  whale_2.jpg", "cafe\u0301.png"):
        image(tmp_path / name)
    assert all_captions(ImageTextDataset(str(tmp_path), caption="x", prefix="p ")) == ["p x"] * 3
    assert all_captions(ImageTextDataset(str(tmp_path), caption="")) == [""] * 3
    named = ImageTextDataset(str(tmp_path), captions_from_file_names=True, max_samples=2)
    assert [named[0]["text"], named[1]["text"]] == ["blue whale 2", "caf\u00e9"]
    assert len(named) == 2
    both = {"caption": "x", "captions_from_file_names": True}
    assert_error("got caption and captions_from_file_names.*expected one source", str(tmp_path), **both)


def test_single_image(tmp_path):
    file = image(tmp_path / "style.png", 9)
    image(tmp_path / "other.png")
    file.with_suffix(".txt").write_text("a glass style")
    dataset = ImageTextDataset(str(file))
    assert (len(dataset), dataset[0]["text"], shades(dataset)) == (1, "a glass style", [9])


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ("a fox", ["a fox"]),
        ("\n  a fox\t\r\n\r\n", ["a fox"]),
        ("", [""]),
        (" \n\n", [""]),
        ("a fox\r\n\n red, sly \n\t\na fox\n", ["a fox", "red, sly", "a fox"]),
        ("a\u2028b\x0bc", ["a\u2028b\x0bc"]),  # lines end with \n, \r\n or \r alone
    ],
)
def test_each_line_of_a_text_file_is_a_caption(tmp_path, text, captions):
    image(tmp_path / "a.png").with_suffix(".txt").write_text(text, encoding="utf-8", newline="")
    image(tmp_path / "b.png").with_suffix(".txt").write_text("a dog\n")
    dataset = ImageTextDataset(str(tmp_path), prefix="my ")
    texts = [[f"my {caption}" for caption in captions], ["my a dog"]]
    assert [as_list(dataset[index]["text"]) for index in range(2)] == list(dataset.all_captions()) == texts
    taken = {Stream(dataset, [], [], seed=1)[position]["text"] for position in range(60)}
    assert taken == {*texts[0], "my a dog"}


def test_other_encodings_are_errors(tmp_path):
    file = image(tmp_path / "a.png").with_suffix(".txt")
    for encoding in ("utf-16", "utf-16-le", "cp1251"):
        file.write_bytes("лиса fox".encode(encoding))
        assert_error("a.txt is not UTF-8|a.txt holds NUL", str(tmp_path))
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.png,fox\n".encode("utf-16"))
    assert_error("metadata.csv is not UTF-8 text .byte 0.; save it as UTF-8", str(tmp_path))


def test_missing_images_and_captions_are_counted(tmp_path):
    (tmp_path / "notes.md").write_text("nothing here")
    assert_error("no images in", str(tmp_path))
    for name in "cab":
        image(tmp_path / f"{name}.png")
    assert_error("no captions in .*expected metadata.csv", str(tmp_path))
    (tmp_path / "b.txt").write_text("only this")
    assert_error("2 of 3 images in .* have no caption: a.png, c.png; give each a NAME.txt", str(tmp_path))
    assert_error("got column 'title', but the captions of .* no metadata.csv", str(tmp_path), caption_column="title")
    assert_error("got column 'file', but", str(tmp_path), caption="x", image_column="file")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\nc.png,y\n")
    assert_error("1 of 3 images in .* have no caption: b.png; give each a row", str(tmp_path))
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\nnope.png,y\n")
    assert_error("metadata.csv, line 3 names the image 'nope.png', which does not exist", str(tmp_path))
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png\n")
    assert_error("metadata.csv, line 2: 'text' got None; expected a text", str(tmp_path))
    (tmp_path / "metadata.csv").write_text("")
    assert_error("metadata.csv has no column 'file_name'; it has no rows", str(tmp_path))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("a.png,a fox, running", "line 2 has more fields than the first line; quote texts with"),
        ('a.png,"a fox', "line [23] is not CSV: unexpected end of data"),
    ],
)
def test_invalid_csv(tmp_path, content, match):
    image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + content + "\n")
    assert_error(match, str(tmp_path))


@pytest.mark.parametrize("separator", [";", "\t", ","])
def test_metadata_separated_by_semicolons_or_tabs(tmp_path, separator):
    for name in "ab":
        image(tmp_path / f"{name}.png")
    rows = [("file_name", "text"), ("a.png", '"a fox, running"'), ("b.png", '"red; sly"')]
    (tmp_path / "metadata.csv").write_text("".join(separator.join(row) + "\n" for row in rows))
    assert all_captions(ImageTextDataset(str(tmp_path))) == ["a fox, running", "red; sly"]


def test_all_that_is_wrong_is_reported_at_once(tmp_path):
    for number in range(9):
        image(tmp_path / f"{number}.png")
    rows = ["file_name,text", "0.png,x", "1.png", *(f"lost{number}.png,x" for number in range(7)), "2.png,a,b"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    metadata = tmp_path / "metadata.csv"
    with pytest.raises(UserError) as caught:
        ImageTextDataset(str(tmp_path))
    lost = [
        f"  {metadata}, line {number + 4} names the image 'lost{number}.png', which does not exist; "
        "expected a path relative to this file"
        for number in range(3)
    ]
    assert caught.value.lines == [
        f"{tmp_path} has 9 problems:",
        f"  {metadata}, line 11 has more fields than the first line; quote texts with commas",
        f"  {metadata}, line 3: 'text' got None; expected a text, empty for none, or a list of texts",
        *lost,
        f"  and 4 more rows of {metadata}",
    ]
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,x\nlost.png,x\n")
    with pytest.raises(UserError) as caught:
        ImageTextDataset(str(tmp_path))
    assert caught.value.lines == [
        f"{tmp_path} has 2 problems:",
        f"  {metadata}, line 3 names the image 'lost.png', which does not exist; expected a path relative to this file",
        f"  8 of 9 images in {tmp_path} have no caption: 1.png, 2.png, 3.png, 4.png, 5.png and 3 more; "
        "give each a row in the metadata, or remove it",
    ]


def test_linked_folders_are_read_once(tmp_path):
    image(tmp_path / "elsewhere" / "a.png", 5)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    assert shades(ImageTextDataset(str(tmp_path / "data"), caption="x")) == [5]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"file_name": "a.png", "text": "x"}\n{"file_name"', "metadata.jsonl, line 2 is not JSON"),
        ('["a.png", "x"]', "line 1 got .*; expected an object"),
        ('{"file_name": "a.png", "text": 5}', "line 1: 'text' got 5; expected a text"),
        ('{"file_name": "a.png", "text": []}', "line 1: 'text' got \\[\\]; expected a text"),
        ('{"file_name": 5, "text": "x"}', "line 1 names the image 5, which does not exist"),
    ],
)
def test_invalid_json_lines(tmp_path, content, match):
    image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(content)
    assert_error(match, str(tmp_path))


def test_two_metadata_files_in_one_folder(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "y"}')
    assert_error("holds both metadata.csv and metadata.jsonl; keep one", str(tmp_path))


def test_text_file_with_an_image_suffix_is_an_error_when_read(tmp_path):
    (tmp_path / "note.jpg").write_text("no image")
    dataset = ImageTextDataset(str(tmp_path), caption="x")
    with pytest.raises(UnreadableImage, match=r"note.jpg cannot be read as an image"):
        dataset[0]


def test_folder_of_images_has_no_splits_or_revisions(tmp_path):
    image(tmp_path / "a.png")
    assert_error("split got 'test'.*no splits", str(tmp_path), caption="x", split="test")
    assert_error("revision got 'v1'.*has no revisions", str(tmp_path), caption="x", revision="v1")
    assert_error("max_samples got 0; expected at least 1", str(tmp_path), caption="x", max_samples=0)


HOSTILE_METADATA = {
    "nested": ("[" * 100_000, "line 1 is not JSON: maximum recursion depth"),
    "digits": ('{"file_name": "a.png", "text": ' + "9" * 5000 + "}", "line 1 is not JSON: Exceeds the limit"),
    "long name": ('{"file_name": "' + "a" * 5000 + '.png", "text": "x"}', "which does not exist"),
    "NUL in a name": ('{"file_name": "a\\u0000.png", "text": "x"}', "which does not exist"),
    "surrogate in a name": ('{"file_name": "\\ud800.png", "text": "x"}', "which does not exist"),
    "folder": ('{"file_name": ".", "text": "x"}', "which does not exist"),
    "NUL": ('{"file_name": "a.png", "text": "a\\u0000b"}', "line 1: 'text' holds NUL"),
    "surrogate": ('{"file_name": "a.png", "text": "\\ud800"}', "holds NUL or characters that are not Unicode"),
    "long": (
        '{"file_name": "a.png", "text": "' + "a" * 70_000 + '"}',
        "has 70,000 characters; expected at most 65,536",
    ),
    "null in a list": ('{"file_name": "a.png", "text": ["x", null]}', "expected a text"),
}


@pytest.mark.parametrize(("content", "match"), HOSTILE_METADATA.values(), ids=HOSTILE_METADATA)
def test_hostile_metadata(tmp_path, content, match):
    image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(content)
    assert_error(match, str(tmp_path))


@pytest.mark.parametrize(
    "name", ["../secret.png", "ABSOLUTE/secret.png", "../data-2/secret.png", "sub/../../secret.png"]
)
def test_metadata_that_names_images_outside_of_the_folder(tmp_path, name, monkeypatch):
    for folder in (tmp_path, tmp_path / "data-2"):
        image(folder / "secret.png", 9)
    image(tmp_path / "data" / "sub" / "a.png")
    row = {"file_name": name.replace("ABSOLUTE", str(tmp_path)), "text": "x"}
    rows = [{"file_name": "sub/../sub/a.png", "text": "y"}, row]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path / "data")
    for root in (str(tmp_path / "data"), "."):
        assert_error(
            "names the image '.*secret.png' outside of its folder .*, or set --cfg-options allow_outside=True", root
        )
    assert sorted(shades(ImageTextDataset(".", allow_outside=True))) == [0, 9]


def test_links_inside_the_folder_are_followed(tmp_path):
    image(tmp_path / "elsewhere" / "b.png", 7)
    image(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text\na.png,x\nmore/b.png,y\n")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert shades(ImageTextDataset(str(tmp_path / "link"))) == [0, 7]


@pytest.mark.parametrize("name", ["odd.png", "metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["FIFO", "device"])
def test_fifos_and_devices_are_not_read(tmp_path, name, make):
    image(tmp_path / "a.png").with_suffix(".txt").write_text("x")
    make(tmp_path / name)
    if name != "odd.png":
        assert_error(f"{name}' cannot be read: it is no regular file", str(tmp_path))
        return
    dataset = ImageTextDataset(str(tmp_path), caption="x")
    for read in (dataset.__getitem__, dataset.content, dataset.size):
        with pytest.raises(UnreadableImage, match="it is no regular file"):
            read(1)


def test_huge_text_files_are_not_read(tmp_path):
    for name, size in (("a.txt", "68.72 GB; expected at most 1.0 MB"), ("metadata.jsonl", "expected at most 1.07 GB")):
        image(tmp_path / "a.png")
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**36)
        assert_error(f"{name}' has {size}" if name == "a.txt" else f"{name}' has 68.72 GB; {size}", str(tmp_path))
        (tmp_path / name).unlink()


def test_file_names_that_are_not_utf8_or_hold_line_ends(tmp_path):
    image(tmp_path / "two\nlines\x1b.png")
    assert all_captions(ImageTextDataset(str(tmp_path), captions_from_file_names=True)) == ["two lines\x1b"]
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"")
    assert_error("the name of .* is not UTF-8; rename the file", str(tmp_path), caption="x")
