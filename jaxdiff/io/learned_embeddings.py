"""Learned words (textual inversion, arXiv 2208.01618) in the files that diffusers and A1111's web UI exchange.

diffusers writes a safetensors or torch file of one tensor a word, under the word's name; A1111 writes one word, whose
vectors are called `emb_params` (safetensors) or lie below `string_to_param` (torch, as the paper's own code writes it)
and whose name is the file's; so does ComfyUI, which also calls them `clip_l`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxdiff.errors import InputError
from jaxdiff.io.file_kinds import check_kind
from jaxdiff.io.torch_files import read_torch
from jaxdiff.io.weight_files import note_weights
from jaxdiff.io.weights import check_finite, read_safetensors, write_safetensors

Learned = dict[str, Float[np.ndarray, "_ _"]]
"""By word, the vectors that stand for it, one after another."""
A1111, COMFYUI = "emb_params", "clip_l"
"""Names of vectors whose word is the file's name."""


def read_learned(path: Path) -> Learned:
    """Return the words of one file.

    Raises:
      InputError: missing, damaged, or not such a file.
    """
    path = path.expanduser()
    if not path.is_file():
        raise InputError(f"--embeddings {path}: no such file")
    note_weights(path)
    tensors: Any
    if path.suffix == ".safetensors":
        tensors = read_safetensors(path)
        check_kind(f"--embeddings {path}", tensors, "words")
        tensors = dict(tensors)
    elif path.suffix in (".bin", ".pt"):
        tensors = read_torch(path)
        named = tensors if isinstance(tensors, Mapping) else {}
        inner = named.get("state_dict")
        check_kind(f"--embeddings {path}", inner if isinstance(inner, Mapping) else named, "words")
        if isinstance(tensors, Mapping) and isinstance(tensors.get("string_to_param"), Mapping):
            tensors = {A1111: next(iter(tensors["string_to_param"].values()), None)}
    else:
        raise InputError(f"--embeddings {path}: must be a .safetensors, .bin or .pt file")
    if not isinstance(tensors, Mapping) or not tensors:
        raise InputError(f"--embeddings {path}: holds no tensors by name")
    learned = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, np.ndarray) or tensor.ndim not in (1, 2) or not tensor.size:
            raise InputError(f"--embeddings {path}: {name} is no vector of a word, nor several")
        if np.iscomplexobj(tensor) or not str(name).strip():
            wrong = f"{name} has complex numbers" if np.iscomplexobj(tensor) else f"the name {name!r} is no word"
            raise InputError(f"--embeddings {path}: {wrong}")
        check_finite(f"--embeddings {path}", str(name), tensor)
        word = path.stem if name in (A1111, COMFYUI) else str(name)
        learned[word] = np.atleast_2d(np.asarray(tensor, np.float32))
    return learned


def write_learned(path: Path, learned: Learned) -> None:
    """Write words into one file; of such files, diffusers' `load_textual_inversion` reads those of one word."""
    write_safetensors(path, {word: rows[0] if len(rows) == 1 else rows for word, rows in learned.items()})


def write_learned_apart(path: Path, learned: Learned) -> list[Path]:
    """Write each word into a file of its own, named after `path` and its number; return the paths."""
    paths = [path.with_stem(f"{path.stem}_{number}") for number in range(len(learned))]
    for file, (word, rows) in zip(paths, learned.items()):
        write_learned(file, {word: rows})
    return paths
