"""A byte-pair vocabulary learnt from the captions, once per run; the same captions give the same text files."""

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from diffengine.errors import UserError, require
from diffengine.models.loading import load_component

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
MOST = 2**20  # entries, or tokens of a caption


def learn_vocabulary(captions: Iterable[str], size: int, max_length: int) -> dict[str, str]:
    """Learn a CLIP-style vocabulary of at most `size` entries, for captions of `max_length` tokens: files by name.

    Both count the two special tokens. `size` is at least 514: 256 bytes, each alone and at the end of a word. The end
    token has the highest id, by which CLIP's text model finds it.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    for name, number, least in (("vocab_size", size, 2 * len(alphabet) + 2), ("max_length", max_length, 3)):
        if not isinstance(number, int) or not least <= number <= MOST:
            raise UserError(f"model.tokenizer.{name} got {number!r}; expected a number from {least} to {MOST:,}")
    clip = make_tokenizer({START: 0, END: 1}, [], max_length).backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    learner.normalizer, learner.pre_tokenizer = clip.normalizer, clip.pre_tokenizer  # split as CLIP's
    ends = [letter + END_OF_WORD for letter in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2, initial_alphabet=alphabet, end_of_word_suffix=END_OF_WORD, show_progress=False,
        special_tokens=ends,  # fixes their ids, which break ties; else these follow hash order, and change per run
    )  # fmt: skip
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    words = alphabet + ends + ["".join(pair) for pair in merges]
    vocab = {word: index for index, word in enumerate(dict.fromkeys([*words[: size - 2], START, END]))}
    merges = [pair for pair in merges if "".join(pair) in vocab]
    return to_assets(make_tokenizer(vocab, merges, max_length))


def make_tokenizer(vocab: Mapping[str, int], merges: list[tuple[str, str]], max_length: int) -> CLIPTokenizer:
    """A CLIPTokenizer over a vocabulary; captions are padded with the end token, as CLIP's are."""
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    return CLIPTokenizer(vocab=dict(vocab), merges=merges, model_max_length=max_length, **special)


def to_assets(tokenizer: CLIPTokenizer) -> dict[str, str]:
    """The files that `save_pretrained` writes, as text by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_text(encoding="utf-8") for file in sorted(Path(folder).iterdir())}


def from_assets(assets: Mapping[str, str]) -> CLIPTokenizer:
    """The tokenizer that `to_assets` wrote; a UserError if these are no files of one."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in assets.items():
            known = re.fullmatch(r"\w+\.(json|txt)", name, re.ASCII)
            require(known is not None, f"assets hold {name!r}; expected files of a tokenizer, such as tokenizer.json")
            (Path(folder) / name).write_text(text, encoding="utf-8", errors="replace")
        return load_component(folder, "tokenizer", CLIPTokenizer.from_pretrained)
