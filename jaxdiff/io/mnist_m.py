"""MNIST-M: handwritten digits blended into photographs, and the idx files that MNIST comes in.

    (1)  picture = |crop - 255 * digit|,  digit binarised to {0, 1}, computed in int        (arXiv 1505.07818, sec. 5.2)

A crop is a random patch of a photograph; the paper takes them from BSDS500.
"""

import gzip
import struct
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt8

from jaxdiff.errors import InputError
from jaxdiff.io.images import read_image

IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def blend(crops: UInt8[np.ndarray, "N H W 3"], digits: Bool[np.ndarray, "N H W"]) -> UInt8[np.ndarray, "N H W 3"]:
    """Return equation (1): the crop, with its colours inverted where the digit is."""
    return np.abs(crops.astype(np.int16) - 255 * digits[..., None].astype(np.int16)).astype(np.uint8)


def random_crops(
    photos: list[UInt8[np.ndarray, "_ _ 3"]], number: int, size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "N H W 3"]:
    """Cut `number` patches of `size` x `size` pixels, each from a photograph and a place drawn at random."""
    crops = np.empty((number, size, size, 3), np.uint8)
    chosen = rng.integers(0, len(photos), number)
    places = rng.random((number, 2))
    for i, (which, (y, x)) in enumerate(zip(chosen, places)):
        photo = photos[which]
        top, left = int(y * (photo.shape[0] - size + 1)), int(x * (photo.shape[1] - size + 1))
        crops[i] = photo[top : top + size, left : left + size]
    return crops


def make_mnist_m(
    digits: UInt8[np.ndarray, "N H W"], photos: list[UInt8[np.ndarray, "_ _ 3"]], seed: int
) -> UInt8[np.ndarray, "N H W 3"]:
    """Blend every digit into a crop of its own; the same seed gives the same pictures."""
    crops = random_crops(photos, len(digits), digits.shape[1], np.random.default_rng(seed))
    return blend(crops, digits > 0)


def read_idx(path: Path) -> UInt8[np.ndarray, "*shape"]:
    """Read an idx file of bytes, gzipped or not.

    Raises:
      InputError: the file is missing, cut short, or not an idx file of bytes.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, rank = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    except (OSError, EOFError, struct.error) as error:
        raise InputError(f"{path}: not a readable idx file ({error})") from error
    if zeros != 0 or kind != 8 or len(data) != 4 + 4 * rank + int(np.prod(shape)):
        raise InputError(f"{path}: not an idx file of bytes, or cut short")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_mnist(folder: Path, split: str) -> tuple[UInt8[np.ndarray, "N H W"], Int[np.ndarray, "N"]]:
    """Read MNIST's digits and labels of one split, "train" or "test", from the original files, gzipped or not."""
    paths = []
    for name in IDX_FILES[split]:
        found = [path for path in (folder / f"{name}.gz", folder / name) if path.exists()]
        if not found:
            raise InputError(f"{folder}: no {name} or {name}.gz there; it should hold MNIST's four idx files")
        paths.append(found[0])
    return read_idx(paths[0]), read_idx(paths[1]).astype(np.int32)


def read_photos(folder: Path, smallest: int) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """Read every photograph below a folder, in order of name.

    Raises:
      InputError: there is none, or one is smaller than `smallest` pixels on a side.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"})
    if not paths:
        raise InputError(f"{folder}: no .jpg or .png photographs there")
    photos = [read_image(path) for path in paths]
    for path, photo in zip(paths, photos):
        if min(photo.shape[:2]) < smallest:
            raise InputError(f"{path}: {photo.shape[1]}x{photo.shape[0]} pixels, smaller than a {smallest} pixel crop")
    return photos
