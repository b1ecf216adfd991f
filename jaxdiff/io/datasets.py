"""Labelled pictures from anywhere as one value, checked before use, in an order that is a function of (seed, step).

digits               embedded, no download                                     (digits.py)
PATH                 {domain}/train.csv + {domain}/data/*.png, or
                     {domain}/{label}/*.png                                    (folders.py)
tfds:NAME[,NAME...]  prepared TensorFlow Datasets builders, a domain each      (tfds_source.py)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int, Shaped, UInt8

from jaxdiff.errors import InputError

HELD_OUT_SHARE = 0.1
"""Share of each class and domain that is held out where the data set names no test split."""
MAX_SKIPPED_SHARE = 0.01
"""More unreadable pictures than this share are an error."""


@dataclass(frozen=True)
class Dataset:
    """Decoded pictures with a class and a domain each; class and domain are indices into the names."""

    images: UInt8[np.ndarray, "N H W C"]
    labels: Int[np.ndarray, "N"]
    domains: Int[np.ndarray, "N"]
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...]

    def subset(self, chosen: Shaped[np.ndarray, "_"]) -> "Dataset":
        """Return the pictures that an index or boolean array chooses."""
        return replace(self, images=self.images[chosen], labels=self.labels[chosen], domains=self.domains[chosen])

    def counts(self) -> Int[np.ndarray, "D K"]:
        """Count pictures by domain (row) and class (column)."""
        counts = np.zeros((len(self.domain_names), len(self.class_names)), np.int64)
        np.add.at(counts, (self.domains, self.labels), 1)
        return counts


class Splits(NamedTuple):
    """What is trained on, what is kept for judging, and the files that could not be read, with reasons."""

    train: Dataset
    held_out: Dataset
    skipped: tuple[str, ...] = ()


class Batch(NamedTuple):
    """One training batch, still bytes."""

    images: Any
    labels: Any
    domains: Any


def load_data(source: str, image_size: int | None = None) -> Splits:
    """Load a data set by its name, folder or TFDS name.

    Args:
      source: as in the table above.
      image_size: height and width in pixels to resize to; None keeps the data's own.

    Raises:
      InputError: nothing usable there; the message names the file and the rule.
    """
    if source == "digits":
        from jaxdiff.io import digits

        names = tuple("0123456789"), digits.DOMAINS
        train, held_out = (Dataset(*digits.embedded_digits(held_out), *names) for held_out in (False, True))
        splits = Splits(train, held_out)
        return splits if image_size is None else resize(splits, image_size)
    if source.startswith("tfds:"):
        from jaxdiff.io.tfds_source import load_tfds

        splits = load_tfds(source.removeprefix("tfds:").split(","), image_size)
    else:
        from jaxdiff.io.folders import load_folder

        splits = load_folder(Path(source), image_size)
    check_splits(source, splits)
    return splits


def resize(splits: Splits, image_size: int) -> Splits:
    """Resize every picture with Pillow's bicubic filter."""
    from jaxdiff.io.images import resize_image

    def resized(dataset: Dataset) -> Dataset:
        return replace(dataset, images=np.stack([resize_image(image, image_size) for image in dataset.images]))

    return splits._replace(train=resized(splits.train), held_out=resized(splits.held_out))


def check_splits(source: str, splits: Splits) -> None:
    """Raise InputError unless both parts hold pictures and few enough were unreadable."""
    kept = len(splits.train.images) + len(splits.held_out.images)
    if len(splits.skipped) > MAX_SKIPPED_SHARE * (kept + len(splits.skipped)):
        raise InputError(
            f"{source}: {len(splits.skipped)} of {kept + len(splits.skipped)} pictures cannot be read, more than "
            f"{MAX_SKIPPED_SHARE:.0%}; the first is {splits.skipped[0]}"
        )
    for part, dataset in (("training", splits.train), ("held-out", splits.held_out)):
        if not len(dataset.images):
            raise InputError(f"{source}: no {part} pictures; each class needs at least two")


def split_off(dataset: Dataset, share: float = HELD_OUT_SHARE) -> tuple[Dataset, Dataset]:
    """Split each class of each domain in the same proportion; the same data always split the same way."""
    order = np.random.default_rng(0).permutation(len(dataset.images))
    group = dataset.domains[order] * len(dataset.class_names) + dataset.labels[order]
    held_out = np.zeros(len(order), bool)
    for value in np.unique(group):
        members = order[group == value]
        held_out[members[: max(1, round(len(members) * share)) if len(members) > 1 else 0]] = True
    return dataset.subset(~held_out), dataset.subset(held_out)


def describe(splits: Splits) -> str:
    """Return the data check as text: image size, pictures per domain and class, files left out."""
    height, width, channels = splits.train.images.shape[1:]
    lines = [f"images {height}x{width}x{channels}"]
    for part, dataset in (("train", splits.train), ("held out", splits.held_out)):
        for name, row in zip(dataset.domain_names, dataset.counts()):
            spread = f"{row.min()} to {row.max()} a class" if len(row) > 1 else ""
            lines.append(f"  {part:<9} {name:<16} {row.sum():>7,} pictures, {spread}")
            missing = [dataset.class_names[i] for i in np.flatnonzero(row == 0)]
            if missing:
                lines.append(f"            no pictures of class {', '.join(missing[:10])}")
    if splits.skipped:
        lines.append(f"  skipped   {len(splits.skipped)} unreadable: {'; '.join(splits.skipped[:3])}")
    return "\n".join(lines)


def batches(
    dataset: Dataset, seed: int, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Callable[[int], Batch]:
    """Return the function from step to batch: every epoch in a new order, batches running across its end.

    It holds no state, so a resumed run, and any number of processes, see the same order.

    Args:
      dataset: what to draw from.
      seed: of the order.
      batch_size: over all processes.
      process_index: which equal slice of each batch is returned.
      process_count: number of slices.
    """
    order = grain.MapDataset.range(len(dataset.images)).seed(seed).shuffle().repeat()
    part = batch_size // process_count

    def batch_at(step: int) -> Batch:
        first = step * batch_size + process_index * part
        chosen = np.asarray([order[i] for i in range(first, first + part)])
        return Batch(dataset.images[chosen], dataset.labels[chosen], dataset.domains[chosen])

    return batch_at
