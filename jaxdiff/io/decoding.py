"""Decode many pictures of one size in threads; those that cannot be read are left out and named."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from jaxdiff.errors import InputError
from jaxdiff.io.images import read_image, resize_image

CHUNK = 256
"""Pictures that a thread decodes at a time."""

Picture = UInt8[np.ndarray, "_ _ 3"]


class Encoded(NamedTuple):
    """One picture before it is decoded."""

    name: str
    file: Path | bytes


class Decoded(NamedTuple):
    """The pictures that could be read, which of all they are, and why the others were skipped."""

    images: UInt8[np.ndarray, "N H W 3"]
    kept: Int[np.ndarray, "N"]
    skipped: tuple[str, ...]


def decode_all(pictures: Sequence[Encoded], image_size: int | None = None, workers: int | None = None) -> Decoded:
    """Decode pictures as RGB.

    Args:
      pictures: at least one.
      image_size: height and width in pixels to resize to; None keeps their own, which must then be equal.
      workers: threads; None means a few more than there are cores.

    Raises:
      InputError: no picture can be read, or two differ in size.
    """
    images = np.empty((0, 0, 0, 3), np.uint8)
    kept: list[int] = []
    skipped: list[str] = []
    chunks = [pictures[first : first + CHUNK] for first in range(0, len(pictures), CHUNK)]
    pool = ThreadPoolExecutor(workers)
    try:
        decoded = pool.map(lambda chunk: [decode(picture, image_size) for picture in chunk], chunks)
        for number, image in enumerate(image for chunk in decoded for image in chunk):
            if isinstance(image, str):
                skipped.append(image)
                continue
            if not kept:
                images = allocate(len(pictures), image, pictures[number].name)
            if image.shape != images.shape[1:]:
                raise InputError(
                    f"{pictures[number].name} is {image.shape[1]}x{image.shape[0]} pixels but "
                    f"{pictures[kept[0]].name} is {images.shape[2]}x{images.shape[1]}: give --image-size to resize all"
                )
            images[len(kept)] = image
            kept.append(number)
    finally:
        pool.shutdown(cancel_futures=True)
    if not kept:
        raise InputError(f"none of {len(pictures):,} pictures can be read; the first is {skipped[0]}")
    return Decoded(images[: len(kept)], np.array(kept), tuple(skipped))


def allocate(number: int, image: Picture, name: str) -> UInt8[np.ndarray, "N H W 3"]:
    """Make room for pictures of the size of the first one."""
    try:
        return np.empty((number, *image.shape), np.uint8)
    except MemoryError as error:
        raise InputError(
            f"{number:,} pictures of {image.shape[1]}x{image.shape[0]} pixels, as {name} is, do not fit in memory: "
            "give --image-size"
        ) from error


def decode(picture: Encoded, image_size: int | None) -> Picture | str:
    """Return the picture, or in one line why it cannot be read."""
    try:
        image = read_image(BytesIO(picture.file) if isinstance(picture.file, bytes) else picture.file)
    except OSError as error:
        return f"{picture.name}: {error}"
    return image if image_size is None else resize_image(image, image_size)
