"""Adapters: learned words and what was learned of a network's matrices, in one small safetensors file.

    word.<new1>       vectors of a word, (n, D)
    unet.NAME         what is added to the matrix of that name in the UNet, its parts joined with dots, (in, out)
    unet.NAME.left    the same as a product of two, (in, rank), ...
    unet.NAME.right   ... and (rank, out)

A NAME is that of the matrix within the UNet; for the tokens of one word alone, `<new1>@` stands before it.

The metadata give the format, its version, and the hash of the model that the adapter was learned with.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdiff.errors import InputError
from jaxdiff.io.file_kinds import check_kind
from jaxdiff.io.learned_embeddings import Learned
from jaxdiff.io.weight_files import note_weights
from jaxdiff.io.weights import check_finite, read_safetensors, write_safetensors

FORMAT, VERSION = "jaxdiff.adapter", "1"
OF = "@"
"""Stands between a word and the matrix that is for its tokens alone."""
WORD, UNET, LEFT, RIGHT = "word.", "unet.", ".left", ".right"
Deltas = Mapping[str, Float[np.ndarray, "_ _"]]
"""By name within the UNet, what is added to a matrix; by word, `OF` and name, for the tokens of that word alone."""


class Adapter(NamedTuple):
    """What was learned beside a model that did not change.

    Attributes:
      base: hash of that model.
      words: new words.
      deltas: what is added to its matrices.
    """

    base: str
    words: Learned
    deltas: Deltas


def of_all(deltas: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the matrices that are for all tokens."""
    return {name: delta for name, delta in deltas.items() if OF not in name}


def of_words(deltas: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the matrices that are for the tokens of one word alone."""
    return {name: delta for name, delta in deltas.items() if OF in name}


def at_rank(matrix: Float[np.ndarray, "n m"], rank: int | None) -> Float[np.ndarray, "n m"]:
    """Return the nearest matrix of a rank, or, where it is None, the matrix itself."""
    if rank is None or rank >= min(matrix.shape):
        return matrix
    left, right = _factors(matrix, rank)
    return left @ right


def _factors(matrix: Float[np.ndarray, "n m"], rank: int) -> tuple[np.ndarray, np.ndarray]:
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return (left[:, :rank] * values[:rank]).astype(np.float32), right[:rank].astype(np.float32)


def write_adapter(path: Path, adapter: Adapter, rank: int | None = None) -> None:
    """Write an adapter.

    Args:
      path: of the file.
      adapter: what was learned.
      rank: keep each matrix as the nearest of this rank; None means all of it.
    """
    tensors = {f"{WORD}{word}": np.asarray(rows, np.float32) for word, rows in adapter.words.items()}
    for name, delta in adapter.deltas.items():
        whole = np.asarray(delta, np.float32)
        if rank is None or rank >= min(whole.shape):
            tensors[f"{UNET}{name}"] = whole
        else:
            tensors[f"{UNET}{name}{LEFT}"], tensors[f"{UNET}{name}{RIGHT}"] = _factors(whole, rank)
    write_safetensors(path, tensors, {"format": FORMAT, "version": VERSION, "base": adapter.base})


def read_adapter(path: Path) -> Adapter:
    """Read an adapter.

    Raises:
      InputError: missing, damaged, no adapter, or of a version that is not known.
    """
    path = path.expanduser()
    if not path.is_file():
        raise InputError(f"--adapters {path}: no such file")
    note_weights(path)
    file = read_safetensors(path)
    check_kind(f"--adapters {path}", file, "adapter")
    about = getattr(file, "metadata", {})
    if about.get("format") != FORMAT or not about.get("base"):
        raise InputError(f"--adapters {path}: no adapter of jaxdiff; files of words alone are given by --embeddings")
    if about.get("version") != VERSION:
        raise InputError(
            f"--adapters {path}: version {about.get('version')} of the format, but only {VERSION} is known"
        )
    words: Learned = {}
    deltas: dict[str, np.ndarray] = {}
    for name in file:
        tensor = file[name]
        check_finite(f"--adapters {path}", name, tensor)
        if tensor.ndim != 2 or tensor.dtype != np.float32 or not name.startswith((WORD, UNET)):
            raise InputError(f"--adapters {path}: {name} is neither vectors of a word nor a matrix of the UNet")
        if name.startswith(WORD):
            words[name.removeprefix(WORD)] = tensor
        elif name.endswith(LEFT):
            other = name.removesuffix(LEFT) + RIGHT
            if other not in file or file[other].shape[:1] != tensor.shape[1:]:
                raise InputError(f"--adapters {path}: {name} has no {other} that it could be multiplied with")
            deltas[name.removeprefix(UNET).removesuffix(LEFT)] = tensor @ file[other]
        elif not name.endswith(RIGHT):
            deltas[name.removeprefix(UNET)] = tensor
        elif name.removesuffix(RIGHT) + LEFT not in file:
            raise InputError(f"--adapters {path}: {name} has no other half")
    if not words and not deltas:
        raise InputError(f"--adapters {path}: holds nothing")
    return Adapter(about["base"], words, deltas)
