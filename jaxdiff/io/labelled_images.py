"""Pictures with class names, for a classifier that knows classes by their names alone.

{class}_{image}.png + labels      one flat folder; labels is a JSON object {"0": "bicycle", "1": "chair", ...}
{class name}/*.png                a folder a class; with labels the folders may be numbers
TABLE.csv                         columns filename,label (or image_name,label); paths start at the csv's folder
digits                            the held-out part of the embedded digits
"""

import csv
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from jaxdiff.errors import InputError
from jaxdiff.io.digit_captions import CLASS_NAMES
from jaxdiff.io.folders import SUFFIXES, is_whole_number
from jaxdiff.io.images import is_overview, read_image
from jaxdiff.io.prompts import clean_name
from jaxdiff.io.strict_json import read_strict_json

Pixels = UInt8[np.ndarray, "_ _ 3"]


@dataclass(frozen=True)
class LabelledImages:
    """Pictures that are decoded when they are asked for.

    Attributes:
      names: of the pictures, as reports give them.
      labels: class of each.
      class_names: by number.
      sources: file or pixels of each.
      read: decodes a file, or raises OSError.
    """

    names: Sequence[str]
    labels: Int[np.ndarray, "N"]
    class_names: tuple[str, ...]
    sources: Sequence[Path | Pixels]
    read: Callable[[Path], Pixels] = read_image

    def load(self, number: int) -> Pixels | str:
        """Return one picture, or in one line why it cannot be read."""
        source = self.sources[number]
        try:
            return self.read(source) if isinstance(source, Path) else source
        except OSError as error:
            return f"{self.names[number]}: {error}"


def load_labelled(images: str, labels: Path | None, clean_names: bool) -> LabelledImages:
    """List pictures and classes in one of the layouts above.

    Args:
      images: folder, csv file or `digits`.
      labels: JSON object of class number -> class name.
      clean_names: underscores in class names become spaces.

    Raises:
      InputError: nothing there, a picture of no known class, a class without pictures, or labels that are not usable.
    """
    if images == "digits":
        return embedded()
    path = Path(images).expanduser()
    given = read_labels(labels) if labels is not None else None
    if path.is_file():
        found = list_csv(path)
    elif path.is_dir():
        found = list_folder(path)
    else:
        raise InputError(f"--images {images}: no such folder or csv file; or give `digits`")
    if not found:
        raise InputError(f"--images {images}: no pictures there ({', '.join(sorted(SUFFIXES))})")
    if given is None and path.is_dir() and found[0][0].parent == path:
        raise InputError(f"--images {images}: the files are named by class numbers: say what they mean by --labels")
    class_names = given if given is not None else tuple(sorted({label for _, label in found}))
    numbers = number_classes(images, found, class_names, given is not None)
    spoken = tuple(map(clean_name, class_names)) if clean_names else class_names
    require_different(spoken)
    root = path if path.is_dir() else path.parent
    return LabelledImages([str(file.relative_to(root)) for file, _ in found], numbers, spoken, [f for f, _ in found])


def number_classes(
    images: str, found: Sequence[tuple[Path, str]], class_names: Sequence[str], numbered: bool
) -> Int[np.ndarray, "N"]:
    """Return the class of every picture, given by its name or, where classes are `numbered`, by its number.

    Raises:
      InputError: a picture of no known class, or a class without pictures.
    """
    index = {name: number for number, name in enumerate(class_names)}
    if numbered:
        index |= {str(number): number for number in range(len(class_names))}
    for file, label in found:
        if label not in index:
            raise InputError(f"{file}: its class {label!r} is not in the labels")
    numbers = np.array([index[label] for _, label in found], np.int32)
    absent = sorted(set(range(len(class_names))) - set(numbers.tolist()))
    if absent:
        more = f" and {len(absent) - 1} more classes" if len(absent) > 1 else ""
        raise InputError(f"--images {images}: no picture of class {class_names[absent[0]]!r}{more}")
    return numbers


def embedded() -> LabelledImages:
    """Return the held-out embedded digits."""
    from jaxdiff.io.digits import DOMAINS, embedded_digits

    pixels, labels, domains = embedded_digits(held_out=True)
    names = [f"{DOMAINS[domain]}/{label}_{number:04d}" for number, (label, domain) in enumerate(zip(labels, domains))]
    return LabelledImages(names, labels, CLASS_NAMES, list(pixels))


def read_labels(path: Path) -> tuple[str, ...]:
    """Return the class names of a JSON object whose keys are 0..K-1.

    Raises:
      InputError: it is no such object, or a name is empty or stands there twice.
    """
    values = read_strict_json(path)
    wanted = [str(number) for number in range(len(values))]
    if not values or set(values) != set(wanted):
        wrong = sorted(set(values) - set(wanted)) or ["none"]
        raise InputError(
            f"--labels {path}: the keys of {len(values)} classes must be 0..{max(len(values) - 1, 0)}, but one is "
            f"{wrong[0]!r}"
        )
    names = [values[number] for number in wanted]
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"--labels {path}: the name of class {number} is {name!r}, but must be a text")
    require_different(names)
    return tuple(names)


def require_different(names: Sequence[str]) -> None:
    """Raise InputError where two classes have one name, which no prompt can tell apart."""
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(f"--labels: {count} classes have the name {name!r}; prompts cannot tell them apart")


def list_folder(folder: Path) -> list[tuple[Path, str]]:
    """Return files and their classes as the names of folders or files give them."""
    folders = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if folders:
        return [(file, child.name) for child in folders for file in pictures(child)]
    files = pictures(folder)
    for file in files:
        number = file.stem.split("_")[0]
        if "_" not in file.stem or not is_whole_number(number):
            raise InputError(f"{file}: must be called CLASS_IMAGE{file.suffix}, with the class's number first")
    return [(file, str(int(file.stem.split("_")[0]))) for file in files]


def pictures(folder: Path, suffixes: Collection[str] = SUFFIXES) -> list[Path]:
    """Return the picture files of a folder in order of name."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes)


def single_pictures(folder: Path) -> list[Path]:
    """Return the same without the grids and sheets that jaxdiff's commands write beside their pictures."""
    return [file for file in pictures(folder) if not is_overview(file)]


def list_csv(table: Path) -> list[tuple[Path, str]]:
    """Return files and classes of a csv.

    Raises:
      InputError: a column is missing, or a file is not there.
    """
    found = []
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            column = next((name for name in ("filename", "image_name") if name in (rows.fieldnames or ())), None)
            if column is None or "label" not in (rows.fieldnames or ()):
                raise InputError(f"{table}: its first line must be filename,label")
            for row in rows:
                path = table.parent / (row[column] or "")
                if not path.is_file():
                    raise InputError(f"{table}, line {rows.line_num}: {row[column]!r} is not in {table.parent}")
                found.append((path, (row["label"] or "").strip()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: not a readable csv in UTF-8 ({error})") from error
    return found
