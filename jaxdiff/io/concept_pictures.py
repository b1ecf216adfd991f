"""Concepts to learn: `<word>:FOLDER:initialiser[:style]`, their pictures, and the texts that speak of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from jaxdiff.errors import InputError
from jaxdiff.io.images import read_image, resize_image
from jaxdiff.io.labelled_images import pictures
from jaxdiff.io.prompts import read_prompts

Kind = Literal["object", "style"]
TEMPLATES: dict[Kind, tuple[str, ...]] = {
    "object": (
        "a photo of {}",
        "a picture of {}",
        "a close photo of {}",
        "a bright photo of {}",
        "a dark photo of {}",
        "a cropped photo of {}",
        "a photo of one {}",
        "a photo of my {}",
        "a good picture of {}",
        "a photo of {} in front of something",
        "an image of {}",
        "{}",
    ),
    "style": (
        "a painting in the style of {}",
        "a picture in the style of {}",
        "a drawing in the style of {}",
        "a bright painting in the style of {}",
        "a dark painting in the style of {}",
        "a large painting in the style of {}",
        "a detail of a painting in the style of {}",
        "a scene in the style of {}",
        "an image in the style of {}",
        "something in the style of {}",
    ),
}
"""Neutral texts around a learned word, after arXiv 2208.01618, section 3."""
LEAST_CROP = 0.7
"""Smallest random crop, as a share of the shorter side."""
LEAST_SIDE = 8
"""Pixels; smaller pictures show nothing."""


@dataclass(frozen=True)
class Concept:
    """One word to learn.

    Attributes:
      word: what prompts will say.
      folder: holds its pictures.
      initializer: words whose embedding is where learning starts.
      kind: which texts speak of it.
    """

    word: str
    folder: Path
    initializer: str
    kind: Kind = "object"


def parse_concept(text: str) -> Concept:
    """Return the concept that a flag describes.

    Raises:
      InputError: it is not `<word>:FOLDER:initialiser[:style]`.
    """
    parts = text.split(":")
    kinds: dict[str, Kind] = {"object": "object", "style": "style"}
    kind = kinds.get(parts.pop()) if len(parts) > 3 and parts[-1] in kinds else "object"
    word, folder, initializer = parts[0], ":".join(parts[1:-1]), parts[-1]
    if len(parts) < 3 or not word.strip() or not folder or not initializer.strip() or kind is None:
        raise InputError(f"--concept {text!r}: must be <word>:FOLDER:initialiser or <word>:FOLDER:initialiser:style")
    if any(sign.isspace() for sign in word):
        raise InputError(f"--concept {text!r}: the word {word!r} holds a space")
    return Concept(word, Path(folder), initializer.strip(), kind)


def read_concept_pictures(
    concept: Concept, size: int, crops: int = 0, seed: int = 0
) -> UInt8[np.ndarray, "N size size 3"]:
    """Return the pictures of a concept, cut to squares and resized; those that cannot be read are left out and named.

    All whole pictures come first, then their crops.

    Args:
      concept: whose pictures.
      size: height and width in pixels.
      crops: random squares of each picture.
      seed: of the squares.

    Raises:
      InputError: no such folder, or no picture that can be read.
    """
    folder = concept.folder.expanduser()
    if not folder.is_dir():
        raise InputError(f"--concept {concept.word}: {concept.folder}: no such folder")
    found: list[UInt8[np.ndarray, "_ _ 3"]] = []
    cropped, faults = [], []
    for path in pictures(folder):
        try:
            pixels = read_image(path)
            if min(pixels.shape[:2]) < LEAST_SIDE:
                raise OSError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels, too few to show anything")
            rng = np.random.default_rng([seed, len(found)])
            cropped += [resize_image(cut_square(pixels, rng), size) for _ in range(crops)]
            found.append(resize_image(pixels, size))
        except OSError as error:
            faults.append(f"{path.name}: {error}")
    if not found:
        more = f"; the first of {len(faults)} that cannot be read is {faults[0]}" if faults else ""
        raise InputError(f"--concept {concept.word}: {concept.folder}: holds no picture to learn from{more}")
    for fault in faults:
        print(f"left out: {fault}")
    return np.stack(found + cropped)


def cut_square(pixels: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "side side 3"]:
    """Return a random square of a picture."""
    side = max(1, round(rng.uniform(LEAST_CROP, 1) * min(pixels.shape[:2])))
    top, left = (int(rng.integers(length - side + 1)) for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


def texts_of(concepts: Sequence[Concept], templates: Path | None = None) -> list[list[str]]:
    """Return for each concept its texts, the word in its place.

    Args:
      concepts: words to learn.
      templates: file of texts with {} for the word, one a line; None means the built-in ones.

    Raises:
      InputError: the file cannot be read, or a line has no {}.
    """
    if templates is None:
        return [[template.replace("{}", concept.word) for template in TEMPLATES[concept.kind]] for concept in concepts]
    lines = read_prompts(templates, "--templates")
    if without := [line for line in lines if "{}" not in line]:
        raise InputError(f"--templates {templates}: the line {without[0]!r} has no {{}} for the word")
    return [[line.replace("{}", concept.word) for line in lines] for concept in concepts]
