"""Labelled pictures from folders, one folder a domain.

    {domain}/train.csv + {domain}/data/*.png     csv columns image_name,label; an optional test.csv is held out
    {domain}/{label}/*.png                       the sub-folder is the class

Labels are integers 0..K-1 in a csv; sub-folders may have any names, and are classes in order (numeric if all are).
"""

import csv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxdiff.errors import InputError
from jaxdiff.io.datasets import Dataset, Splits, split_off
from jaxdiff.io.images import read_image, resize_image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
MAX_CLASSES = 10_000


class Entry(NamedTuple):
    """One picture before it is decoded."""

    path: Path
    label: str
    domain: int
    held_out: bool


def load_folder(folder: Path, image_size: int | None = None) -> Splits:
    """Read every domain below a folder.

    Raises:
      InputError: no such folder, nothing in it, or a csv, label, or picture size that breaks the rules above.
    """
    if not folder.is_dir():
        raise InputError(f"--data {folder}: no such folder; give `digits`, a folder of domains, or tfds:NAME")
    domains = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    entries = [entry for number, domain in enumerate(domains) for entry in list_domain(domain, number)]
    if not entries:
        raise InputError(
            f"--data {folder}: no pictures there; it should hold DOMAIN/train.csv with DOMAIN/data/*.png, "
            "or DOMAIN/LABEL/*.png"
        )
    class_names = order_classes({entry.label for entry in entries})
    with ThreadPoolExecutor() as pool:
        decoded = list(pool.map(lambda entry: decode(entry.path, image_size), entries))
    skipped = tuple(image for image in decoded if isinstance(image, str))
    good = [(entry, image) for entry, image in zip(entries, decoded) if not isinstance(image, str)]
    if not good:
        raise InputError(f"--data {folder}: none of its {len(entries)} pictures can be read; first: {skipped[0]}")
    check_sizes(good)
    dataset = Dataset(
        np.stack([image for _, image in good]),
        np.array([class_names.index(entry.label) for entry, _ in good], np.int32),
        np.array([entry.domain for entry, _ in good], np.int32),
        class_names,
        tuple(domain.name for domain in domains),
    )
    held_out = np.array([entry.held_out for entry, _ in good])
    # A domain without a test split of its own gives a share of its pictures.
    own_split = np.isin(dataset.domains, np.unique(dataset.domains[held_out]))
    train, rest = split_off(dataset.subset(~own_split))
    return Splits(
        concatenate(train, dataset.subset(own_split & ~held_out)),
        concatenate(rest, dataset.subset(own_split & held_out)),
        skipped,
    )


def list_domain(domain: Path, number: int) -> Iterator[Entry]:
    """Yield the pictures of one domain, from its csv files if it has them, else from its sub-folders."""
    if (domain / "train.csv").exists():
        yield from read_csv(domain, "train.csv", number, held_out=False)
        if (domain / "test.csv").exists():
            yield from read_csv(domain, "test.csv", number, held_out=True)
        return
    for label in sorted(child for child in domain.iterdir() if child.is_dir()):
        for path in sorted(label.iterdir()):
            if path.suffix.lower() in SUFFIXES:
                yield Entry(path, label.name, number, held_out=False)


def read_csv(domain: Path, name: str, number: int, held_out: bool) -> Iterator[Entry]:
    """Yield the pictures of one csv, each checked to exist and to have an integer label."""
    table = domain / name
    present = {path.name for path in (domain / "data").iterdir()} if (domain / "data").is_dir() else set()
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        for column in ("image_name", "label"):
            if column not in (rows.fieldnames or ()):
                raise InputError(f"{table}: no column {column!r}; it needs image_name,label")
        for row in rows:
            image_name, label = row["image_name"], row["label"]
            where = f"{table}, line {rows.line_num}"
            if image_name not in present:
                raise InputError(f"{where}: {image_name!r} is not in {domain / 'data'}")
            if not (label or "").strip().isdecimal() or int(label) >= MAX_CLASSES:
                raise InputError(f"{where}: label {label!r} is not an integer in 0..{MAX_CLASSES - 1}")
            yield Entry(domain / "data" / image_name, str(int(label)), number, held_out)


def order_classes(labels: set[str]) -> tuple[str, ...]:
    """Return class names in order; whole numbers fill up to the largest, so that label k is class k."""
    if all(label.isdecimal() for label in labels):
        return tuple(str(number) for number in range(max(int(label) for label in labels) + 1))
    return tuple(sorted(labels))


def decode(path: Path, image_size: int | None) -> UInt8[np.ndarray, "H W 3"] | str:
    """Return the picture, or in one line why it cannot be read."""
    try:
        image = read_image(path)
    except OSError as error:
        message = str(error)
        return message if str(path) in message else f"{path}: {message}"
    return image if image_size is None else resize_image(image, image_size)


def check_sizes(pictures: list[tuple[Entry, np.ndarray]]) -> None:
    """Raise InputError unless all pictures have the size of the first."""
    first, image = pictures[0]
    for entry, other in pictures:
        if other.shape != image.shape:
            raise InputError(
                f"{entry.path} is {other.shape[1]}x{other.shape[0]} pixels but {first.path} is "
                f"{image.shape[1]}x{image.shape[0]}: give --image-size to resize all"
            )


def concatenate(first: Dataset, second: Dataset) -> Dataset:
    """Join two parts of one data set."""
    return Dataset(
        np.concatenate([first.images, second.images]),
        np.concatenate([first.labels, second.labels]),
        np.concatenate([first.domains, second.domains]),
        first.class_names,
        first.domain_names,
    )
