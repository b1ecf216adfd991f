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


def read_concept_pictures(concept: Concept, size: int) -> UInt8[np.ndarray, "N size size 3"]:
    """Return the pictures of a concept, cut to squares and resized; those that cannot be read are left out and named.

    Raises:
      InputError: no such folder, or no picture that can be read.
    """
    folder = concept.folder.expanduser()
    if not folder.is_dir():
        raise InputError(f"--concept {concept.word}: {concept.folder}: no such folder")
    found, faults = [], []
    for path in pictures(folder):
        try:
            pixels = read_image(path)
            if min(pixels.shape[:2]) < LEAST_SIDE:
                raise OSError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels, too few to show anything")
            found.append(resize_image(pixels, size))
        except OSError as error:
            faults.append(f"{path.name}: {error}")
    if not found:
        more = f"; the first of {len(faults)} that cannot be read is {faults[0]}" if faults else ""
        raise InputError(f"--concept {concept.word}: {concept.folder}: holds no picture to learn from{more}")
    for fault in faults:
        print(f"left out: {fault}")
    return np.stack(found)


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
