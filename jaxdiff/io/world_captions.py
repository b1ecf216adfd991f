"""Captions of the tiny world: some name a digit, some tell its parts, and none has the name of one of the ten.

"a photo of the digit three."            a name
"a photo of the digit looped holed."     parts, which several digits may share
"a photo of the digit digit."            neither
"three in the style of a street."        where it is, too
"""

from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxdiff.io.digit_captions import ANYWHERE, CAPTIONS, CLASS_NAMES, vocabulary_of

UNSPOKEN = 9
"""The digit whose name no caption holds."""
UNKNOWN = "digit"
"""What a caption says that neither names nor describes; it is as often a nine as any other digit."""
PARTS: Mapping[str, frozenset[int]] = {
    "looped": frozenset({8, 9}),
    "arched": frozenset({0, 2, 3}),
    "flat": frozenset({5, 7}),
    "pointed": frozenset({1, 4, 6}),
    "legged": frozenset({1, 4, 7, 9}),
    "bowled": frozenset({0, 3, 5}),
    "ringed": frozenset({6, 8}),
    "based": frozenset({2}),
    "holed": frozenset({0, 6, 8, 9}),
}
"""Digits of which a word holds: four for their upper part, four for their lower part, and one for both."""
STYLES = ("photograph", "street")
"""The domains of `jaxdiff.io.digits.DOMAINS`, as styles."""
WORLD_CAPTIONS = (*CAPTIONS, *((f"{{}} in the style of a {style}.", domain) for domain, style in enumerate(STYLES)))
NAMED, DESCRIBED, EMPTY = 0.4, 0.4, 0.1
"""Shares of captions with a name, with parts, and of empty ones, for guidance; the rest says `UNKNOWN`. Where a name
would stand of the digit that has none, its parts do."""
PART_BEFORE_NAME = 0.25
"""Share of names that follow a part."""
NUMBERS_OF_PARTS = (0.2, 0.4, 0.4)
"""Shares of descriptions with one part, two and three."""


class Caption(NamedTuple):
    """One caption.

    Attributes:
      text: what it says.
      digits: of which it is true.
      domain: that it names, or `ANYWHERE`.
    """

    text: str
    digits: frozenset[int]
    domain: int


def world_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges in CLIP's layout, every word of the captions as one token."""
    texts = [text.replace("{}", "") for text, _ in WORLD_CAPTIONS]
    return vocabulary_of([*texts, *CLASS_NAMES, *PARTS, UNKNOWN])


def draw_captions(
    rng: np.random.Generator,
    labels: Int[np.ndarray, "N"],
    domains: Int[np.ndarray, "N"],
    count: int,
    empty: float = EMPTY,
) -> tuple[Int[np.ndarray, "count"], list[Caption]]:
    """Draw pictures, all equally often, and a true caption for each.

    Args:
      rng: random numbers.
      labels: of all pictures.
      domains: the same.
      count: of captions.
      empty: share of empty ones.

    Returns:
      Number of each picture, and the captions.
    """
    chosen, captions = rng.integers(len(labels), size=count), []
    for picture in chosen:
        kind = rng.random() * (1 - EMPTY + empty)
        label, domain = int(labels[picture]), int(domains[picture])
        if kind < NAMED and label != UNSPOKEN:
            subject, digits = name_digit(rng, label), frozenset({label})
        elif kind < NAMED + DESCRIBED:
            subject, digits = describe_parts(rng, label)
        elif kind < 1 - EMPTY:
            subject, digits = UNKNOWN, frozenset(range(10))
        else:
            captions.append(Caption("", frozenset(range(10)), ANYWHERE))
            continue
        fitting = [caption for caption in WORLD_CAPTIONS if caption[1] in (ANYWHERE, domain)]
        template, spoken = fitting[rng.integers(len(fitting))]
        captions.append(Caption(template.replace("{}", subject), digits, spoken))
    return chosen, captions


def name_digit(rng: np.random.Generator, label: int) -> str:
    """Return a digit's name, sometimes after one of its parts."""
    own = [word for word, digits in PARTS.items() if label in digits]
    part = f"{own[rng.integers(len(own))]} " if rng.random() < PART_BEFORE_NAME else ""
    return part + CLASS_NAMES[label]


def describe_parts(rng: np.random.Generator, label: int) -> tuple[str, frozenset[int]]:
    """Return some of a digit's parts, in any order, and all digits that have them."""
    own = [word for word, digits in PARTS.items() if label in digits]
    number = min(1 + int(rng.choice(len(NUMBERS_OF_PARTS), p=NUMBERS_OF_PARTS)), len(own))
    sets = list(combinations(own, number))
    words = list(sets[rng.integers(len(sets))])
    rng.shuffle(words)
    return " ".join(words), frozenset.intersection(*(PARTS[word] for word in words))
