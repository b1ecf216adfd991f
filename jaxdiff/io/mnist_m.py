"""MNIST-M: handwritten digits blended into photographs, and the idx files that MNIST comes in.

    (1)  picture = |crop - 255 * digit|,  digit binarised to {0, 1}, computed in int        (arXiv 1505.07818, sec. 5.2)

A crop is a random patch of a photograph; the paper takes them from BSDS500.
"""

import gzip
import math
import struct
import zlib
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
    for which in np.unique(chosen):
        rows = chosen == which
        patches = np.lib.stride_tricks.sliding_window_view(photos[which], (size, size), axis=(0, 1))
        top, left = (places[rows] * patches.shape[:2]).astype(int).T
        crops[rows] = patches[top, left].transpose(0, 2, 3, 1)
    return crops


def make_mnist_m(
    digits: UInt8[np.ndarray, "N H W"], photos: list[UInt8[np.ndarray, "_ _ 3"]], seed: int
) -> UInt8[np.ndarray, "N H W 3"]:
    """Blend every digit into a crop of its own; the same seed gives the same pictures."""
    crops = random_crops(photos, len(digits), digits.shape[1], np.random.default_rng(seed))
    return blend(crops, digits > 0)


def make_split(
    mnist: Path, photos: Path, split: str, seed: int = 0
) -> tuple[UInt8[np.ndarray, "N H W 3"], Int[np.ndarray, "N"]]:
    """Make the pictures and labels of one split, "train" or "test", from MNIST's files and a folder of photographs.

    Each split has crops of its own: "train" draws them with `seed`, "test" with the next one.
    """
    digits, labels = read_mnist(mnist, split)
    images = make_mnist_m(digits, read_photos(photos, digits.shape[1]), seed + list(IDX_FILES).index(split))
    return images, labels


def read_idx(path: Path) -> UInt8[np.ndarray, "*shape"]:
    """Read an idx file of bytes, gzipped or not.

    Raises:
      InputError: the file is missing, cut short, or not an idx file of bytes.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, rank = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise InputError(f"{path}: not a readable idx file ({error})") from error
    if zeros != 0 or kind != 8 or len(data) != 4 + 4 * rank + math.prod(shape):
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
    digits, labels = (read_idx(path) for path in paths)
    if digits.ndim != 3 or labels.shape != digits.shape[:1]:
        raise InputError(f"{folder}: {split} digits of shape {digits.shape} do not fit labels of shape {labels.shape}")
    if labels.max(initial=0) > 9:
        raise InputError(f"{paths[1]}: label {labels.max()} is not a digit 0..9")
    return digits, labels.astype(np.int32)


def read_photos(folder: Path, smallest: int) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """Read every photograph below a folder, in order of name.

    Raises:
      InputError: there is none, or one cannot be read or is smaller than `smallest` pixels on a side.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"})
    if not paths:
        raise InputError(f"{folder}: no .jpg or .png photographs there")
    photos = []
    for path in paths:
        try:
            photo = read_image(path)
        except OSError as error:
            raise InputError(f"{path}: this photograph cannot be read: {error}") from error
        if min(photo.shape[:2]) < smallest:
            raise InputError(f"{path}: {photo.shape[1]}x{photo.shape[0]} pixels, smaller than a {smallest} pixel crop")
        photos.append(photo)
    return photos
