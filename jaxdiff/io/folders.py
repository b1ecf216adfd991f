"""Labelled pictures from folders, one folder a domain.

    {domain}/train.csv + {domain}/data/*.png     csv columns image_name,label; labels 0..K-1
    {domain}/{label}/*.png                       the sub-folder is the class, of any name

Held out is what a domain's test.csv or val.csv lists, or what lies below its test/ or val/ (`{domain}/test/{label}`,
beside `{domain}/train/{label}`); else a fixed tenth of each of its classes.
"""

import csv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from jaxdiff.errors import InputError
from jaxdiff.io.datasets import Dataset, Splits, choose_held_out
from jaxdiff.io.decoding import Encoded, decode_all
from jaxdiff.io.images import write_png
from jaxdiff.io.progress import progress_bar

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
HELD_OUT_NAMES = ("test", "val")
MAX_CLASSES = 10_000
"""More classes than this are taken for a mistake in the labels."""


class Entry(NamedTuple):
    """One picture before it is decoded."""

    path: Path
    label: str
    domain: int
    held_out: bool


def load_folder(folder: Path, image_size: int | None = None, workers: int | None = None) -> Splits:
    """Read every domain below a folder.

    Args:
      folder: holds the domains' folders; hidden ones are passed over.
      image_size: height and width in pixels to resize to; None keeps the data's own.
      workers: decoding threads; None means a few more than there are cores.

    Raises:
      InputError: no such folder, nothing in it, or a csv, label, or picture size that breaks the rules above.
    """
    domains = list_domains(folder)
    entries = [entry for number, domain in enumerate(domains) for entry in list_domain(domain, number)]
    class_names = order_classes(folder, entries)
    images, chosen, skipped = decode_all([Encoded(str(e.path), e.path) for e in entries], image_size, workers)
    kept = [entries[number] for number in chosen]
    index = {name: number for number, name in enumerate(class_names)}
    dataset = Dataset(
        images,
        np.array([index[entry.label] for entry in kept], np.int32),
        np.array([entry.domain for entry in kept], np.int32),
        class_names,
        tuple(domain.name for domain in domains),
    )
    held_out = np.array([entry.held_out for entry in kept], bool)
    # A domain that holds nothing out itself gives a share of its pictures.
    own_split = np.isin(dataset.domains, [entry.domain for entry in entries if entry.held_out])
    held_out |= choose_held_out(dataset) & ~own_split
    return Splits(dataset.subset(~held_out), dataset.subset(held_out), skipped)


def list_domains(folder: Path) -> list[Path]:
    """Return the domains' folders in order of name."""
    layouts = "it should hold DOMAIN/train.csv with DOMAIN/data/*.png, or DOMAIN/LABEL/*.png"
    if not folder.is_dir():
        raise InputError(f"--data {folder}: no such folder; give `digits`, a folder of domains, or tfds:NAME")
    if (folder / "train.csv").exists():
        raise InputError(f"--data {folder}: this is one domain's folder; give the folder that holds it")
    domains = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not domains:
        raise InputError(f"--data {folder}: no folders there; {layouts}")
    for domain in domains:
        if domain.name in ("train", *HELD_OUT_NAMES):
            raise InputError(
                f"{domain}: a folder named {domain.name!r} belongs inside a domain, as DOMAIN/{domain.name}/LABEL/*.png"
            )
    return domains


def list_domain(domain: Path, number: int) -> list[Entry]:
    """Return the pictures of one domain, from its csv files if it has them, else from its sub-folders."""
    if (domain / "train.csv").exists():
        tables = [(domain / f"{name}.csv", name in HELD_OUT_NAMES) for name in ("train", *HELD_OUT_NAMES)]
        entries = [e for path, held_out in tables if path.exists() for e in read_csv(path, number, held_out)]
        trained = {entry.path for entry in entries if not entry.held_out}
        for entry in entries:
            if entry.held_out and entry.path in trained:
                raise InputError(f"{entry.path}: listed both in train.csv and as held out; list it once")
    elif (domain / "data").is_dir():
        raise InputError(f"{domain}: no train.csv beside its data folder; it should have columns image_name,label")
    else:
        entries = list(list_labels(domain, number))
    if not entries:
        raise InputError(
            f"--data {domain.parent}: no pictures for domain {domain.name!r}; "
            f"it should hold {domain.name}/train.csv with {domain.name}/data/*.png, or {domain.name}/LABEL/*.png"
        )
    return entries


def list_labels(domain: Path, number: int) -> Iterator[Entry]:
    """Yield the pictures below a domain's class folders."""
    splits = [("train", False), *((name, True) for name in HELD_OUT_NAMES)]
    names = {name for name, _ in splits}
    places = [(domain, False), *((domain / name, held_out) for name, held_out in splits if (domain / name).is_dir())]
    for place, held_out in places:
        for label in sorted(child for child in place.iterdir() if child.is_dir() and child.name not in names):
            name = str(int(label.name)) if is_whole_number(label.name) else label.name
            for path in sorted(label.iterdir()):
                if path.suffix.lower() in SUFFIXES:
                    yield Entry(path, name, number, held_out)


def read_csv(table: Path, number: int, held_out: bool) -> Iterator[Entry]:
    """Yield the pictures of one csv, each checked to exist and to have an integer label."""
    data = table.parent / "data"
    present = {path.name for path in data.iterdir()} if data.is_dir() else set()
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            for column in ("image_name", "label"):
                if column not in (rows.fieldnames or ()):
                    raise InputError(f"{table}: no column {column!r}; its first line must be image_name,label")
            for row in rows:
                image_name, label = row["image_name"], (row["label"] or "").strip()
                where = f"{table}, line {rows.line_num}"
                if image_name not in present:
                    raise InputError(f"{where}: {image_name!r} is not in {data}")
                if not is_whole_number(label) or int(label) >= MAX_CLASSES:
                    raise InputError(f"{where}: label {label!r} is not an integer in 0..{MAX_CLASSES - 1}")
                yield Entry(data / image_name, str(int(label)), number, held_out)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: not a readable csv in UTF-8 ({error})") from error


def is_whole_number(text: str) -> bool:
    """Tell whether a text is 0, 1, 2, ... in plain digits."""
    return text.isascii() and text.isdecimal() and len(text) <= 9


def order_classes(folder: Path, entries: list[Entry]) -> tuple[str, ...]:
    """Return the class names in order: by value if all are whole numbers, else by name.

    Raises:
      InputError: csv labels that leave a number out, which a wrong label or counting from 1 does.
    """
    found = {entry.label for entry in entries}
    if len(found) > MAX_CLASSES:
        raise InputError(f"--data {folder}: {len(found):,} classes, more than the {MAX_CLASSES:,} allowed")
    from_csv = [entry for entry in entries if entry.path.parent.name == "data"]
    if from_csv:
        named = sorted(label for label in found if not is_whole_number(label))
        if named:
            raise InputError(f"--data {folder}: one domain's csv numbers its classes, another has a class {named[0]!r}")
        largest = max(from_csv, key=lambda entry: int(entry.label))
        missing = [number for number in range(int(largest.label)) if str(number) not in found]
        if missing:
            raise InputError(
                f"--data {folder}: label {largest.label} of {largest.path} is out of range, as no picture has label "
                f"{missing[0]}: labels must be 0..K-1, each with pictures"
            )
    return tuple(sorted(found, key=int if all(map(is_whole_number, found)) else str))


def write_split(
    domain: Path, split: str, images: UInt8[np.ndarray, "N H W C"], labels: Int[np.ndarray, "N"], first_number: int = 0
) -> Path:
    """Write `data/{number:05d}.png` and `{split}.csv`, the first layout above; return the csv's path.

    Args:
      domain: folder to write into.
      split: "train", "test" or "val".
      images: pictures.
      labels: class of each.
      first_number: number of the first picture, so that the splits of a domain do not overwrite each other's files.
    """
    names = [f"{number:05d}.png" for number in range(first_number, first_number + len(images))]
    with ThreadPoolExecutor() as pool, progress_bar(len(images), split, "image") as bar:
        for _ in pool.map(write_png, (domain / "data" / name for name in names), images):
            bar.update()
    table = domain / f"{split}.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image_name", "label"])
        rows.writerows(zip(names, labels.tolist()))
    return table
