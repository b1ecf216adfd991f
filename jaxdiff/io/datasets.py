"""Labelled pictures from anywhere as one value, checked before use, in an order that is a function of (seed, step).

digits               embedded, no download                                     (digits.py)
PATH                 {domain}/train.csv + {domain}/data/*.png, or
                     {domain}/{label}/*.png; a domain each                     (folders.py)
tfds:NAME[,NAME...]  prepared TensorFlow Datasets builders, a domain each      (tfds_source.py)
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt8

from jaxdiff.errors import InputError

HELD_OUT_SHARE = 0.1
"""Share of each class and domain that is held out where the data set names no test split."""
MAX_SKIPPED_SHARE = 0.01
"""More unreadable pictures than this share are an error."""
LISTED_CLASSES = 20
"""With more classes than this, the printed data check leaves out the count of each."""


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


def load_data(source: str, image_size: int | None = None, workers: int | None = None) -> Splits:
    """Load a data set by its name, folder or TFDS name.

    Args:
      source: as in the table above.
      image_size: height and width in pixels to resize to; None keeps the data's own.
      workers: decoding threads; None means a few more than there are cores.

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

        splits = load_tfds(source.removeprefix("tfds:").split(","), image_size, workers)
    else:
        from jaxdiff.io.folders import load_folder

        splits = load_folder(Path(source), image_size, workers)
    check_splits(source, splits)
    return splits


def resize(splits: Splits, image_size: int) -> Splits:
    """Resize every picture with Pillow's bicubic filter."""
    from jaxdiff.io.images import resize_image

    def resized(dataset: Dataset) -> Dataset:
        return replace(dataset, images=np.stack([resize_image(image, image_size) for image in dataset.images]))

    return splits._replace(train=resized(splits.train), held_out=resized(splits.held_out))


def check_splits(source: str, splits: Splits) -> None:
    """Raise InputError unless few pictures were unreadable and every domain and class can be trained and judged."""
    kept = len(splits.train.images) + len(splits.held_out.images)
    if len(splits.skipped) > MAX_SKIPPED_SHARE * (kept + len(splits.skipped)):
        raise InputError(
            f"--data {source}: {len(splits.skipped)} of {kept + len(splits.skipped)} pictures cannot be read, more "
            f"than {MAX_SKIPPED_SHARE:.0%}; the first is {splits.skipped[0]}"
        )
    for part, dataset in (("training", splits.train), ("held-out", splits.held_out)):
        if not len(dataset.images):
            raise InputError(f"--data {source}: no {part} pictures; each class needs at least two")
        for domain, count in zip(dataset.domain_names, dataset.counts().sum(1)):
            if not count:
                raise InputError(
                    f"--data {source}: no {part} pictures of domain {domain}; each class needs at least two"
                )
    untrained = np.flatnonzero(splits.train.counts().sum(0) == 0)
    if len(untrained):
        raise InputError(f"--data {source}: no training pictures of class {splits.train.class_names[untrained[0]]}")


def choose_held_out(dataset: Dataset, share: float = HELD_OUT_SHARE) -> Bool[np.ndarray, "N"]:
    """Choose the same share of each class of each domain, at least one picture of two; classes do not affect others."""
    group = dataset.domains * len(dataset.class_names) + dataset.labels
    chosen = np.zeros(len(group), bool)
    for value in np.unique(group):
        members = np.random.default_rng(0).permutation(np.flatnonzero(group == value))
        chosen[members[: max(1, round(len(members) * share)) if len(members) > 1 else 0]] = True
    return chosen


def join(parts: Sequence[Dataset]) -> Dataset:
    """Join parts of one data set, which have the same names."""
    images, labels, domains = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels", "domains")
    )
    return replace(parts[0], images=images, labels=labels, domains=domains)


def check_data(splits: Splits) -> dict[str, Any]:
    """Return the data check as plain values: image size, pictures per domain and class, files left out, a hash."""
    height, width, channels = splits.train.images.shape[1:]
    counts = {
        part: {
            domain: dict(zip(dataset.class_names, row.tolist()))
            for domain, row in zip(dataset.domain_names, dataset.counts())
        }
        for part, dataset in (("train", splits.train), ("held_out", splits.held_out))
    }
    digest = hashlib.sha256()
    for dataset in (splits.train, splits.held_out):
        for array in (dataset.images, dataset.labels, dataset.domains):
            digest.update(np.ascontiguousarray(array).tobytes())
    return {
        "height": height,
        "width": width,
        "channels": channels,
        **counts,
        "skipped": list(splits.skipped),
        "sha256": digest.hexdigest(),
    }


def describe(splits: Splits) -> str:
    """Return the data check as text: image size, pictures per domain and class, files left out."""
    height, width, channels = splits.train.images.shape[1:]
    lines = [f"images {height}x{width}x{channels}"]
    for part, dataset in (("train", splits.train), ("held out", splits.held_out)):
        for name, row in zip(dataset.domain_names, dataset.counts()):
            spread = f", {row.min():,} to {row.max():,} a class" if len(row) > 1 else ""
            lines.append(f"  {part:<9} {name:<16} {row.sum():>7,} pictures{spread}")
            if 1 < len(row) <= LISTED_CLASSES:
                lines.append("            " + ", ".join(f"{k}: {n:,}" for k, n in zip(dataset.class_names, row)))
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

    Raises:
      InputError: the batch cannot be cut into equal slices.
    """
    if batch_size % process_count:
        raise InputError(f"a batch of {batch_size} cannot be divided equally by {process_count} processes")
    order = grain.MapDataset.range(len(dataset.images)).seed(seed).shuffle().repeat()
    part = batch_size // process_count

    def batch_at(step: int) -> Batch:
        first = step * batch_size + process_index * part
        chosen = np.asarray([order[i] for i in range(first, first + part)])
        return Batch(dataset.images[chosen], dataset.labels[chosen], dataset.domains[chosen])

    return batch_at
