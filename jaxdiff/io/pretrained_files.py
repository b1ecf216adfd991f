"""Parameters in the files that transformers and diffusers publish: Flax msgpack, safetensors, torch."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from flax.serialization import msgpack_serialize
from numpy.typing import DTypeLike

from jaxdiff.errors import InputError
from jaxdiff.io.hub import Fetch
from jaxdiff.io.msgpack_files import read_msgpack
from jaxdiff.io.strict_json import read_strict_json
from jaxdiff.io.torch_files import read_sharded_state_dict, read_state_dict
from jaxdiff.io.torch_layout import as_float32, as_type, from_torch, to_torch
from jaxdiff.io.weight_files import note_weights
from jaxdiff.io.weights import (
    check_specs,
    flatten_params,
    read_safetensors,
    spec_of,
    write_safetensors,
)

CONFIG = "config.json"


class FileNames(NamedTuple):
    """What a library calls the files of a model's parameters."""

    msgpack: str
    safetensors: str
    torch: str


TRANSFORMERS = FileNames("flax_model.msgpack", "model.safetensors", "pytorch_model.bin")
DIFFUSERS = FileNames(
    "diffusion_flax_model.msgpack", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
)

VARIANTS = ("fp16", "non_ema")
"""Words before the ending of files with another copy of the weights: in half the width, or not averaged."""

Leaves = Iterator[tuple[str, np.ndarray]]
"""Flattened name and value of each parameter, in no order."""


def read_config(name: str, fetch: Fetch, files: FileNames = TRANSFORMERS) -> dict[str, Any]:
    """Return what a model's config.json says.

    Raises:
      InputError: there is none, or it is no JSON object.
    """
    path = fetch(CONFIG)
    if path is None:
        raise InputError(f"{name}: has no {CONFIG}; it should hold {CONFIG} and {files.safetensors} or {files.msgpack}")
    return read_strict_json(path)


def read_leaves(
    name: str,
    fetch: Fetch,
    expected: Mapping[str, Any],
    ignored: str,
    prefix: str = "",
    from_pt: bool = False,
    files: FileNames = TRANSFORMERS,
    variant: str | None = None,
    dtype: DTypeLike = np.float32,
) -> Leaves:
    """Yield a model's parameters out of the first of its files that is there, see `candidates`.

    Args:
      name: of the model, for messages.
      fetch: from `open_model`.
      expected: tree of leaves with `shape`, which must be met exactly.
      ignored: regular expression of names in the file that belong to no leaf of the tree.
      prefix: beginning of names that files of torch may leave out.
      from_pt: pass over msgpack.
      files: what the model's library calls them.
      variant: word before the ending of the files.
      dtype: that the parameters shall have, whatever the file has.

    Raises:
      InputError: no such file, a damaged one, another model's, or one with numbers too large for `dtype`.
    """
    path = find_weights(name, fetch, candidates(files, "never" if from_pt else "first", variant))
    if variant is None:
        say_if_variant(name, path)
    note_weights(path)
    if path.suffix == ".msgpack":
        return check_leaves(str(path), flatten_params(read_msgpack(path)), expected, ignored, dtype)
    tensors = read_tensors(path)
    for shard in getattr(tensors, "files", []):
        note_weights(shard)
    if getattr(tensors, "metadata", {}).get("format") == "flax":
        return check_leaves(str(path), tensors, expected, ignored, dtype)
    if any(key.startswith(prefix) for key in tensors):
        prefix = ""
    return from_torch(str(path), tensors, expected, ignored, prefix, dtype)


def candidates(
    files: FileNames, msgpack: Literal["first", "last", "never"] = "first", variant: str | None = None
) -> list[str]:
    """Return the names that a model's parameters may have, in the order in which they are looked for.

    safetensors come before torch, whole ones before shards; without a variant, the plain files come before those of
    `VARIANTS`.

    Args:
      files: what the model's library calls the plain ones.
      msgpack: where it stands among the plain files.
      variant: word before the ending.

    Raises:
      InputError: the variant is no word.
    """
    if variant is not None and not re.fullmatch(r"\w+", variant):
        raise InputError(f"variant={variant!r} is no word, such as fp16")
    of_torch = [name for file in (files.safetensors, files.torch) for name in (file, f"{file}.index.json")]
    if variant is not None:
        return [with_variant(file, variant) for file in of_torch]
    varied = [with_variant(file, word) for word in VARIANTS for file in of_torch]
    plain = {"first": [files.msgpack, *of_torch], "last": [*of_torch, files.msgpack], "never": of_torch}
    return [*plain[msgpack], *varied]


def with_variant(file: str, word: str) -> str:
    """Return the name of a file's variant, as transformers and diffusers call it."""
    stem, ending = file.rsplit(".", 1)
    return f"{stem}.{word}.{ending}"


def find_weights(name: str, fetch: Fetch, names: Sequence[str]) -> Path:
    """Return the first of the files that a model has; with an index, its shards are fetched too.

    Raises:
      InputError: it has none; the message begins with `name`.
    """
    path = next((path for file in names if (path := fetch(file))), None)
    if path is None:
        raise InputError(f"{name}: holds no weights; looked for {', '.join(names)}")
    if path.suffix == ".json":
        fetch_shards(fetch, path)
    return path


def say_if_variant(name: str, path: Path) -> None:
    """Print which file is read where it is not the plain one."""
    if any(f".{word}." in path.name for word in VARIANTS):
        print(f"{name}: no plain weights found, so {path.name} is read")


def read_tensors(path: Path) -> Mapping[str, np.ndarray]:
    """Open a file of tensors, or the index of several, by its name: safetensors or torch's.

    Raises:
      InputError: as `read_safetensors`, `read_state_dict` and `read_sharded_state_dict`.
    """
    if path.suffix == ".json" and ".bin.index." in path.name:
        return read_sharded_state_dict(path)
    return read_safetensors(path) if path.suffix in (".safetensors", ".json") else read_state_dict(path)


def fetch_shards(fetch: Fetch, index: Path) -> None:
    """Fetch all files of a model that is split over several."""
    weight_map = read_strict_json(index).get("weight_map")
    for file in sorted({str(file) for file in weight_map.values()} if isinstance(weight_map, dict) else ()):
        # Of names with folders, the reader of the index tells what is wrong.
        if "/" not in file and "\\" not in file:
            fetch(file)


def check_leaves(
    origin: str, tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any], ignored: str, dtype: DTypeLike
) -> Leaves:
    """Yield leaves that are laid out as the tree is already."""
    wanted = {name: (tuple(leaf.shape), "float32") for name, leaf in flatten_params(expected).items()}
    specs = getattr(tensors, "specs", None) or {name: spec_of(np.asarray(leaf)) for name, leaf in tensors.items()}
    found = {name: as_float32(spec) for name, spec in specs.items() if not re.fullmatch(ignored, name)}
    check_specs(origin, found, wanted)
    for name in wanted:
        yield name, as_type(origin, name, tensors[name], dtype)


def write_leaves(
    folder: Path, params: Mapping[str, Any], safe_serialization: bool, files: FileNames = TRANSFORMERS
) -> Path:
    """Write parameters and return the file.

    Args:
      folder: exists.
      params: nested dicts of arrays.
      safe_serialization: write safetensors in torch's layout, which the libraries' torch classes and their old Flax
        classes both read, instead of msgpack.
      files: what the model's library calls them.
    """
    if safe_serialization:
        if (folder / files.msgpack).exists():
            raise InputError(
                f"{folder}: holds a {files.msgpack}, which would be read instead of {files.safetensors}: remove it"
            )
        path = folder / files.safetensors
        write_safetensors(path, to_torch(params), {"format": "pt"})
        return path
    path = folder / files.msgpack
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(msgpack_serialize(plain(params)))
    partial.replace(path)
    return path


def plain(tree: Any) -> Any:
    """Return nested plain dicts of NumPy arrays."""
    return {name: plain(node) for name, node in tree.items()} if isinstance(tree, Mapping) else np.asarray(tree)
