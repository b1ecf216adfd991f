"""Parameters in the files that transformers and diffusers publish: Flax msgpack, safetensors, torch."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.serialization import msgpack_serialize

from jaxdiff.errors import InputError
from jaxdiff.io.hub import Fetch
from jaxdiff.io.msgpack_files import read_msgpack
from jaxdiff.io.strict_json import read_strict_json
from jaxdiff.io.torch_files import read_state_dict
from jaxdiff.io.torch_layout import as_float32, from_torch, to_torch
from jaxdiff.io.weights import (
    check_finite,
    check_specs,
    flatten_params,
    read_safetensors,
    spec_of,
    write_safetensors,
)

CONFIG = "config.json"
MSGPACK, SAFETENSORS, TORCH = "flax_model.msgpack", "model.safetensors", "pytorch_model.bin"

Leaves = Iterator[tuple[str, np.ndarray]]
"""Flattened name and value of each parameter, float32, in no order."""


def read_config(name: str, fetch: Fetch) -> dict[str, Any]:
    """Return what a model's config.json says.

    Raises:
      InputError: there is none, or it is no JSON object.
    """
    path = fetch(CONFIG)
    if path is None:
        raise InputError(f"{name}: has no {CONFIG}; it should hold {CONFIG} and {SAFETENSORS} or {MSGPACK}")
    return read_strict_json(path)


def read_leaves(
    name: str, fetch: Fetch, expected: Mapping[str, Any], ignored: str, prefix: str = "", from_pt: bool = False
) -> Leaves:
    """Yield a model's parameters out of the first of its files that is there: msgpack, safetensors, torch.

    Args:
      name: of the model, for messages.
      fetch: from `open_model`.
      expected: tree of leaves with `shape`, which must be met exactly.
      ignored: regular expression of names in the file that belong to no leaf of the tree.
      prefix: beginning of names that files of torch may leave out.
      from_pt: pass over msgpack.

    Raises:
      InputError: no such file, a damaged one, or another model's.
    """
    if not from_pt and (path := fetch(MSGPACK)):
        return check_leaves(str(path), flatten_params(read_msgpack(path)), expected, ignored)
    if path := fetch(SAFETENSORS) or fetch_shards(fetch):
        tensors: Mapping[str, np.ndarray] = read_safetensors(path)
        if getattr(tensors, "metadata", {}).get("format") == "flax":
            return check_leaves(str(path), tensors, expected, ignored)
    elif path := fetch(TORCH):
        tensors = read_state_dict(path)
    else:
        raise InputError(f"{name}: holds no weights; looked for {MSGPACK}, {SAFETENSORS} and {TORCH}")
    if any(key.startswith(prefix) for key in tensors):
        prefix = ""
    return from_torch(str(path), tensors, expected, ignored, prefix)


def fetch_shards(fetch: Fetch) -> Path | None:
    """Return the index of a model that is split over several safetensors files, all of them fetched."""
    index = fetch(f"{SAFETENSORS}.index.json")
    if index is not None:
        weight_map = read_strict_json(index).get("weight_map")
        for file in sorted({str(file) for file in weight_map.values()} if isinstance(weight_map, dict) else ()):
            # Of names with folders, the reader of the index tells what is wrong.
            if "/" not in file and "\\" not in file:
                fetch(file)
    return index


def check_leaves(origin: str, tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any], ignored: str) -> Leaves:
    """Yield leaves that are laid out as the tree is already."""
    wanted = {name: (tuple(leaf.shape), "float32") for name, leaf in flatten_params(expected).items()}
    specs = getattr(tensors, "specs", None) or {name: spec_of(np.asarray(leaf)) for name, leaf in tensors.items()}
    found = {name: as_float32(spec) for name, spec in specs.items() if not re.fullmatch(ignored, name)}
    check_specs(origin, found, wanted)
    for name in wanted:
        check_finite(origin, name, tensors[name])
        yield name, np.asarray(tensors[name], np.float32)


def write_leaves(folder: Path, params: Mapping[str, Any], safe_serialization: bool) -> Path:
    """Write parameters and return the file.

    Args:
      folder: exists.
      params: nested dicts of arrays.
      safe_serialization: write `model.safetensors` in torch's layout, which transformers' torch classes and its old
        Flax classes both read, instead of `flax_model.msgpack`.
    """
    if safe_serialization:
        if (folder / MSGPACK).exists():
            raise InputError(f"{folder}: holds a {MSGPACK}, which would be read instead of {SAFETENSORS}: remove it")
        path = folder / SAFETENSORS
        write_safetensors(path, to_torch(params), {"format": "pt"})
        return path
    path = folder / MSGPACK
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(msgpack_serialize(plain(params)))
    partial.replace(path)
    return path


def plain(tree: Any) -> Any:
    """Return nested plain dicts of NumPy arrays."""
    return {name: plain(node) for name, node in tree.items()} if isinstance(tree, Mapping) else np.asarray(tree)
