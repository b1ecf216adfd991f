"""Concepts to learn: `<word>:FOLDER:initialiser[:style]`, their pictures, and the texts that speak of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from jaxdiff.errors import InputError
from jaxdiff.io.folders import SUFFIXES
from jaxdiff.io.images import is_transparent, read_image, resize_image
from jaxdiff.io.labelled_images import single_pictures
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
MAX_PIXELS = 64_000_000
"""A photograph of a telephone may have so many; no more are decoded."""
TRIES = 100
"""Random squares that are tried; then the one in the middle is taken."""
LEAST_SHOWN = 0.1
"""Least mean of a mask in a random square, as a share of its mean in the whole picture."""
OTHER_SUFFIXES = {".heic", ".heif", ".avif", ".tif", ".tiff", ".gif", ".jxl", ".dng"}
"""Of pictures too, which are told to be left out."""
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


def parse_masks(texts: Sequence[str], concepts: Sequence[Concept]) -> dict[str, Path]:
    """Return the folder of masks of each word that has one, from `<word>:FOLDER`.

    Raises:
      InputError: it is not that, no such folder, or no such word.
    """
    found = {}
    for text in texts:
        word, _, folder = text.partition(":")
        if not folder or word in found or word not in {concept.word for concept in concepts}:
            raise InputError(f"--mask {text!r}: must be <word>:FOLDER, once for a word of --concept")
        if not Path(folder).expanduser().is_dir():
            raise InputError(f"--mask {text!r}: {folder}: no such folder")
        found[word] = Path(folder)
    return found


def parse_prior(text: str) -> tuple[Path, str]:
    """Return folder and text of class pictures, from `FOLDER:TEXT`.

    Raises:
      InputError: it is not that.
    """
    folder, _, speaks = text.rpartition(":")
    if not folder or not speaks.strip():
        raise InputError(f'--prior {text!r}: must be FOLDER:TEXT, such as "pictures/dogs:a photo of a dog"')
    return Path(folder), speaks.strip()


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


class ConceptPictures(NamedTuple):
    """Pictures of one size, all whole ones first, then their crops.

    Attributes:
      pixels: squares.
      masks: in [0, 1], how much each pixel counts; None where all count.
      whole: number of whole pictures.
    """

    pixels: UInt8[np.ndarray, "N size size 3"]
    masks: Float[np.ndarray, "N size size"] | None
    whole: int

    def with_mirror_images(self) -> "ConceptPictures":
        """Return these and their mirror images."""
        masks = None if self.masks is None else np.concatenate([self.masks, self.masks[:, :, ::-1]])
        return ConceptPictures(np.concatenate([self.pixels, self.pixels[:, :, ::-1]]), masks, self.whole)


def read_photograph(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """Decode a picture that may be a telephone's, as a viewer shows it; raise OSError as `read_image` does."""
    return read_image(path, MAX_PIXELS, as_shown=True)


def read_concept_pictures(
    concept: Concept, size: int, crops: int = 0, seed: int = 0, masks: Path | None = None
) -> ConceptPictures:
    """Return the pictures of a concept; those that cannot be read are left out and named.

    Args:
      concept: whose pictures.
      size: height and width in pixels, after cutting to squares.
      crops: random squares of each picture.
      seed: of the squares.
      masks: folder of one picture for each picture, of its name and size, white where it counts.

    Raises:
      InputError: no such folder, no picture that can be read, or one without its mask.
    """
    return read_views(f"--concept {concept.word}", concept.folder, size, crops, seed, masks)


def read_views(
    what: str, folder: Path, size: int, crops: int = 0, seed: int = 0, masks: Path | None = None
) -> ConceptPictures:
    """Do what `read_concept_pictures` does, in a folder whose errors begin with `what`."""
    if not folder.expanduser().is_dir():
        raise InputError(f"{what}: {folder}: no such folder")
    found: list[UInt8[np.ndarray, "_ _ 3"]] = []
    shown: list[UInt8[np.ndarray, "_ _ 3"]] = []
    cropped, cropped_shown, faults = [], [], []
    for path in single_pictures(folder.expanduser()):
        try:
            pixels = read_photograph(path)
            if min(pixels.shape[:2]) < LEAST_SIDE:
                raise OSError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels, too few to show anything")
        except OSError as error:
            faults.append(f"{path.name}: {error}")
            continue
        squares = np.random.default_rng([seed, len(found)])
        mask = None if masks is None else read_mask(masks, path, pixels.shape[:2])
        if mask is not None:
            shown.append(resize_image(mask, size))
            if not shown[-1][..., 0].any():
                raise InputError(
                    f"--mask {masks}: all that it shows of {path.name} lies outside the square in the middle, which is "
                    "learned from: cut the picture and its mask to the subject"
                )
        cuts = [draw_square(pixels.shape[0], pixels.shape[1], squares, mask) for _ in range(crops)]
        cropped += [resize_image(pixels[cut], size) for cut in cuts]
        found.append(resize_image(pixels, size))
        if mask is not None:
            cropped_shown += [resize_image(mask[cut], size) for cut in cuts]
    faults += [
        f"{path.name}: only {', '.join(sorted(SUFFIXES))} files are read"
        for path in sorted(folder.expanduser().iterdir())
        if path.suffix.lower() in OTHER_SUFFIXES
    ]
    if not found:
        more = f"; the first of {len(faults)} that cannot be read is {faults[0]}" if faults else ""
        raise InputError(f"{what}: {folder}: holds no picture to learn from{more}")
    for fault in faults:
        print(f"left out: {fault}")
    counted = None if masks is None else np.stack(shown + cropped_shown)[..., 0].astype(np.float32) / 255
    return ConceptPictures(np.stack(found + cropped), counted, len(found))


def read_mask(folder: Path, picture: Path, shape: tuple[int, ...]) -> UInt8[np.ndarray, "H W 3"]:
    """Return the mask of a picture of that height and width.

    Raises:
      InputError: there is none, it cannot be read, is of another size, transparent, or black.
    """
    named = [path for path in single_pictures(folder.expanduser()) if path.stem == picture.stem]
    if len(named) != 1:
        raise InputError(f"--mask {folder}: must hold one mask named {picture.stem}, holds {len(named)}")
    try:
        mask = read_photograph(named[0])
    except OSError as error:
        raise InputError(f"--mask {named[0]}: {error}") from error
    if mask.shape[:2] != shape:
        sizes = " instead of ".join(f"{width}x{height}" for height, width in (mask.shape[:2], shape))
        raise InputError(f"--mask {named[0]}: {sizes} pixels, which its picture has")
    if is_transparent(named[0]):
        raise InputError(
            f"--mask {named[0]}: transparent in places; it must be white where its picture counts, else black"
        )
    if not mask[..., 0].any():
        raise InputError(f"--mask {named[0]}: black, so that nothing of its picture would count")
    return mask


def draw_square(
    height: int, width: int, rng: np.random.Generator, mask: UInt8[np.ndarray, "H W 3"] | None = None
) -> tuple[slice, slice]:
    """Return rows and columns of a random square of a picture, one that shows some of what a mask shows."""
    for _ in range(TRIES):
        side = max(1, round(rng.uniform(LEAST_CROP, 1) * min(height, width)))
        top, left = (int(rng.integers(length - side + 1)) for length in (height, width))
        cut = slice(top, top + side), slice(left, left + side)
        if mask is None or mask[cut][..., 0].mean() > LEAST_SHOWN * mask[..., 0].mean():
            return cut
    return slice(0, height), slice(0, width)


def texts_of(concepts: Sequence[Concept], templates: Sequence[str] = ()) -> list[list[str]]:
    """Return for each concept its texts, the word in its place.

    Args:
      concepts: words to learn.
      templates: from --templates; kinds that it leaves out have the built-in ones.

    Raises:
      InputError: as `read_templates`, or templates of a kind that no concept is of.
    """
    kinds: set[Kind] = {concept.kind for concept in concepts}
    for text in templates:
        of = _parse_templates(text)[0]
        if not kinds & set(of):
            article = "a" if of == ["style"] else "an"
            raise InputError(f"--templates {text}: no --concept is {article} {of[0]}: drop it")
    by_kind = {**TEMPLATES, **read_templates(templates)}
    return [[text.replace("{}", concept.word) for text in by_kind[concept.kind]] for concept in concepts]


def read_templates(given: Sequence[str]) -> dict[Kind, tuple[str, ...]]:
    """Return templates by kind, from FILE for both, or object:FILE and style:FILE.

    Raises:
      InputError: a kind comes twice, a file cannot be read, or a line of it has no {}.
    """
    found: dict[Kind, tuple[str, ...]] = {}
    for text in given:
        kinds, file = _parse_templates(text)
        if set(kinds) & found.keys():
            raise InputError(
                f"--templates {text}: its words have templates already: give one FILE for all, or object:FILE and "
                "style:FILE"
            )
        lines = read_prompts(file, "--templates")
        if without := [line for line in lines if "{}" not in line]:
            raise InputError(f"--templates {text}: the line {without[0]!r} has no {{}} for the word")
        found |= dict.fromkeys(kinds, tuple(lines))
    return found


def _parse_templates(text: str) -> tuple[list[Kind], Path]:
    """Return of which kinds FILE or KIND:FILE is, and the file; what is there as it stands is a file."""
    named, _, file = text.partition(":")
    kinds: list[Kind] = [kind for kind in TEMPLATES if kind == named]
    if not kinds or not file or Path(text).expanduser().is_file():
        return list(TEMPLATES), Path(text)
    return kinds, Path(file)
