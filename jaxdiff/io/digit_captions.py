"""Captions of the embedded digits, for a model that learns pictures from words, and a vocabulary of their words."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxdiff.io.tokenizer import BEGIN, END, CLIPTokenizer

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANYWHERE = -1
"""Domain of a caption that holds in every domain."""
CAPTIONS: tuple[tuple[str, int], ...] = (
    ("a photo of a {}.", ANYWHERE),
    ("a photo of the digit {}.", ANYWHERE),
    ("a picture of the number {}.", ANYWHERE),
    ("the number {}.", ANYWHERE),
    ("the digit {}", ANYWHERE),
    ("{}", ANYWHERE),
    ("a small picture of {}.", ANYWHERE),
    ("a digit, {}.", ANYWHERE),
    ("a photo of the digit {} on a photograph.", 0),
    ("the digit {} written over a photograph.", 0),
    ("{}, its colours inverted, on a photograph.", 0),
    ("a photo of the house number {}.", 1),
    ("the number {} on a house in the street.", 1),
    ("a street number, {}.", 1),
)
"""Templates and the domain that each speaks of, 0 or 1 in the order of `jaxdiff.io.digits.DOMAINS`."""
CONTEXT = 16
"""Most tokens of a caption."""


def caption_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges in CLIP's layout: single signs, and every word of the captions as one token."""
    return vocabulary_of([*(caption for caption, _ in CAPTIONS), *CLASS_NAMES])


def vocabulary_of(texts: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges in CLIP's layout: single signs, and every word of the texts as one token."""
    from tokenizers.pre_tokenizers import ByteLevel

    signs = sorted(ByteLevel.alphabet())
    tokens = [*signs, *(f"{sign}</w>" for sign in signs)]
    merges: list[tuple[str, str]] = []
    words = sorted({word.strip(".,{}") for text in texts for word in text.split()})
    for word in filter(None, words):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair = pieces[-2], pieces[-1]
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            pieces[-2:] = ["".join(pair)]
    vocab = {token: number for number, token in enumerate([*dict.fromkeys(tokens), BEGIN, END])}
    return vocab, merges


def caption_ids(tokenizer: CLIPTokenizer) -> Int[np.ndarray, "captions classes L"]:
    """Return the token ids of every caption of every class."""
    texts = [caption.replace("{}", name) for caption, _ in CAPTIONS for name in CLASS_NAMES]
    ids = tokenizer(texts, length=tokenizer.context_length).input_ids
    return ids.reshape(len(CAPTIONS), len(CLASS_NAMES), -1)
