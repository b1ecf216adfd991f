"""Starting noises from files: one noise a file, the file's stem its name, read without running anything in it."""

import re
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxdiff.errors import InputError
from jaxdiff.io.torch_files import read_torch
from jaxdiff.io.weights import read_safetensors

SUFFIXES = (".pt", ".npy", ".npz", ".safetensors")


def read_noises(folder: Path, image_shape: tuple[int, int, int]) -> tuple[list[str], Float[np.ndarray, "N H W C"]]:
    """Return the names and the noises of a folder, in the order of their numbers, then of their names.

    Args:
      folder: holds one float32 noise a file, channels first as PyTorch has them or last, with or without a leading
        axis of 1. Files of other suffixes are left alone.
      image_shape: height, width and channels that the model draws.

    Raises:
      InputError: no noise there, or one of another shape or type, not finite, or with a name that another file has.
    """
    if not folder.is_dir():
        raise InputError(f"--noise {folder}: no such folder; leave it out to draw noise from --seed")
    paths = sorted((path for path in folder.iterdir() if path.suffix in SUFFIXES), key=_in_order)
    if not paths:
        raise InputError(f"--noise {folder}: no {', '.join(SUFFIXES)} files there")
    for before, path in zip(paths, paths[1:]):
        if before.stem == path.stem:
            raise InputError(f"--noise {folder}: {before.name} and {path.name} would both be drawn as {path.stem}.png")
    return [path.stem for path in paths], np.stack([_checked(path, _read(path), image_shape) for path in paths])


def _in_order(path: Path) -> tuple[int | float, str]:
    number = re.match(r"\d+", path.stem)
    return (int(number.group()) if number else float("inf")), path.name


def _read(path: Path) -> np.ndarray:
    """Return the one array of a file."""
    if path.suffix == ".pt":
        value = read_torch(path)
    elif path.suffix == ".safetensors":
        value = _only(path, read_safetensors(path))
    else:
        try:
            value = np.load(path, allow_pickle=False)
            value = _only(path, value) if path.suffix == ".npz" else value
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: cannot be read ({error})") from error
    if not isinstance(value, np.ndarray):
        raise InputError(f"{path}: holds a {type(value).__name__} instead of one tensor")
    return value


def _only(path: Path, arrays) -> np.ndarray:
    names = list(arrays)
    if len(names) != 1:
        raise InputError(f"{path}: holds {len(names)} arrays instead of one")
    return arrays[names[0]]


def _checked(path: Path, noise: np.ndarray, image_shape: tuple[int, int, int]) -> Float[np.ndarray, "H W C"]:
    """Return the noise channels last, or raise InputError."""
    height, width, channels = image_shape
    if noise.dtype != np.float32:
        raise InputError(f"{path}: is {noise.dtype} instead of float32")
    shape = noise.shape[1:] if noise.ndim == 4 and len(noise) == 1 else noise.shape
    if shape == (channels, height, width):
        noise = noise.reshape(shape).transpose(1, 2, 0)
    elif shape != image_shape:
        raise InputError(
            f"{path}: has the shape {noise.shape}; this model takes (1, {channels}, {height}, {width}) or "
            f"({height}, {width}, {channels})"
        )
    if not np.isfinite(noise).all():
        raise InputError(f"{path}: holds values that are not finite")
    return np.ascontiguousarray(noise.reshape(image_shape))
