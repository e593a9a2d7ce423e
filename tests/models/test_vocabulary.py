"""A vocabulary learned from captions."""

import json

import pytest

from diffengine.errors import UserError
from diffengine.models.amused import AmusedModel
from diffengine.models.amused.vocabulary import from_assets, learn_vocabulary, to_assets

THINGS = ("penguin", "red car", "café", "家", "don't", "2 cats!")
CAPTIONS = [f"{thing} on a {colour} background" for thing in THINGS for colour in ("red", "blue", "white")]


@pytest.fixture(scope="module")
def assets() -> dict[str, str]:
    return learn_vocabulary(CAPTIONS, 600, 20)


def test_end_token_has_the_highest_id(assets: dict[str, str]) -> None:
    tokenizer = from_assets(assets)
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(vocabulary) - 1
    assert tokenizer.bos_token_id == len(vocabulary) - 2
    assert tokenizer.model_max_length == 20


@pytest.mark.parametrize("size", [514, 520, 600])
def test_vocabulary_is_not_larger_than_asked(size: int) -> None:
    assert len(from_assets(learn_vocabulary(CAPTIONS, size, 20))) <= size


def test_merges_are_learned(assets: dict[str, str]) -> None:
    assert from_assets(assets).tokenize("background") == ["background</w>"]


def test_same_captions_give_the_same_files() -> None:
    """All pairs are equally frequent, and the library breaks ties by a hash that differs each time."""
    words = [first + second for first in "abcdefghij" for second in "klmnopqrst"]
    learned = [learn_vocabulary(words, 560, 20) for _ in range(4)]
    assert all(assets == learned[0] for assets in learned)


def test_assets_round_trip(assets: dict[str, str]) -> None:
    assert json.loads(json.dumps(assets)) == assets
    again = from_assets(to_assets(from_assets(assets)))
    assert again(CAPTIONS).input_ids == from_assets(assets)(CAPTIONS).input_ids
    assert again.get_vocab() == from_assets(assets).get_vocab()


def test_distinct_captions_have_distinct_ids(assets: dict[str, str]) -> None:
    ids = from_assets(assets)(CAPTIONS, padding="max_length", truncation=True).input_ids
    assert len({tuple(row) for row in ids}) == len(CAPTIONS)
    assert {len(row) for row in ids} == {20}


@pytest.mark.parametrize("text", ["日本語の説明", "Привет", "مرحبا", "🐧 on 🟦", "naïve café", "tab\tand\nline", "ﬁ"])
def test_any_script_is_encoded(assets: dict[str, str], text: str) -> None:
    tokenizer = from_assets(assets)
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[:-1]  # the end token is also the unknown token
    decoded = "".join(tokenizer.decode(ids, skip_special_tokens=True).split())
    assert decoded == "".join(tokenizer.backend_tokenizer.normalizer.normalize_str(text).split())


@pytest.mark.parametrize(("sizes", "message"), [
    ({"vocab_size": 513}, r"model.tokenizer.vocab_size got 513; expected a number from 514"),
    ({"vocab_size": "big"}, r"model.tokenizer.vocab_size got 'big'; expected a number"),
    ({"max_length": 2}, r"model.tokenizer.max_length got 2; expected a number from 3"),
    ({"length": 2}, r"model.tokenizer: unknown key 'length'; it takes vocab_size and max_length"),
])  # fmt: skip
def test_wrong_sizes(sizes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        AmusedModel.learn_assets({"tokenizer": sizes}, lambda: CAPTIONS)


def test_tokenizer_from_a_folder_learns_nothing() -> None:
    assert AmusedModel.learn_assets({"tokenizer": "folder"}, list) == {}
    assert AmusedModel.learn_assets({}, list) == {}
