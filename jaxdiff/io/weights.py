"""Parameters in safetensors files: one tensor in memory at a time, checked on both sides, written whole or not at all.

A file is 8 bytes of length (little-endian), that many bytes of JSON which describe the tensors, then their bytes. The
length and the JSON are checked here, because a hostile file could otherwise ask for any amount of memory or hold two
tensors of one name; the places of the tensors are checked by the safetensors package. Files are written here, because
the package would take all tensors at once.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (teaches NumPy bfloat16, by which safetensors asks for it)
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxdiff.errors import InputError
from jaxdiff.io.strict_json import parse_json, read_strict_json
from jaxdiff.io.weight_files import note_weights

MAX_NAMED = 8
"""Most tensor names that one message lists."""
MAX_HEADER_BYTES = 2**23
"""Longest header that is parsed; Python needs some ten times its size for what it describes."""
MAX_TENSORS = 20_000
"""Most tensors of one file; Stable Diffusion has 1,100, and the largest language models have fewer in a file."""

Spec = tuple[tuple[int, ...], str]
"""Shape and dtype of a tensor, the latter as NumPy names it."""

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class LazyTensors(Mapping[str, np.ndarray]):
    """Tensors by name, each read or made when it is asked for.

    Attributes:
      specs: shape and dtype of every tensor.
      read: from a name to its tensor.
    """

    specs: Mapping[str, Spec]
    read: Callable[[str], np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.specs:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


class TensorFile(Mapping[str, np.ndarray]):
    """The tensors of one safetensors file by name; each access reads one from disk.

    Attributes:
      specs: shape and dtype of every tensor, known without reading it.
      metadata: the file's free text entries.
    """

    def __init__(self, path: Path):
        self.path = path
        self.specs, self.metadata, self._starts = _read_header(path)
        with _blaming(path):
            safe_open(path, framework="numpy")
            # Kept open, so that a file that takes its place changes nothing; and read, because the pages of a mapped
            # file count as this process's memory beside the copy that is made of them.
            self._file = path.open("rb")

    def __getitem__(self, name: str) -> np.ndarray:
        shape, dtype = self.specs[name]
        tensor = np.empty(shape, dtype)
        with _blaming(self.path):
            self._file.seek(self._starts[name])
            if self._file.readinto(tensor.reshape(-1).view(np.uint8).data) != tensor.nbytes:
                raise OSError("it has become shorter")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


class ShardedTensors(Mapping[str, np.ndarray]):
    """The tensors of a model that was split over several files, by name, as the reader of one file gives them.

    Attributes:
      files: the files, in the order of their names.
    """

    def __init__(
        self,
        index: Path,
        ending: str = ".safetensors",
        open_file: Callable[[Path], "TensorFile | LazyTensors"] = TensorFile,
    ):
        """Open the files that an index names.

        Args:
          index: of the model.
          ending: of the names of its files.
          open_file: reader of one of them.

        Raises:
          InputError: index and files do not fit each other, or a file is damaged.
        """
        self.path = index
        weight_map = _read_index(index, ending)
        shards = {file: open_file(index.parent / file) for file in sorted(set(weight_map.values()))}
        self.files = [index.parent / file for file in shards]
        self._shards = {name: shards[file] for name, file in weight_map.items()}
        found = Counter(name for shard in shards.values() for name in shard)
        misplaced = [f"{name} ({weight_map[name]})" for name, shard in self._shards.items() if name not in shard]
        unlisted, twice = found.keys() - self._shards.keys(), [name for name, times in found.items() if times > 1]
        if faults := list_faults(not_where_it_says=misplaced, not_listed=unlisted, in_two_files=twice):
            raise InputError(f"{index}: does not fit its files ({faults}); download the folder again")

    @property
    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of every tensor, known without reading it."""
        return {name: shard.specs[name] for name, shard in self._shards.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._shards[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)


def read_safetensors(path: Path) -> TensorFile | ShardedTensors:
    """Open a safetensors file, or the `*.safetensors.index*.json` of a model that was split over several.

    Raises:
      InputError: missing, truncated, too long a header, a name twice, a dtype that NumPy lacks; or a shard is missing.
    """
    return ShardedTensors(path) if path.suffix == ".json" else TensorFile(path)


def write_safetensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors (NumPy or JAX arrays) to one file, whole or not at all, asking for one after another.

    Raises:
      InputError: a dtype that safetensors lacks.
      OSError: it cannot be written.
    """
    specs = getattr(tensors, "specs", None) or {name: spec_of(tensor) for name, tensor in tensors.items()}
    header, names = _make_header(path, specs, metadata)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(header)
            for name in names:
                file.write(_bytes_of(tensors[name], specs[name]))
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def flatten_params(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of nested dicts under names joined with dots.

    Raises:
      InputError: a key is empty or holds a dot, so the name would not lead back.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if not key or "." in key:
            raise InputError(f"parameter name {key!r} must be a word without dots")
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": leaf for name, leaf in flatten_params(value).items()}
        else:
            flat[key] = value
    return flat


def unflatten_params(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dicts that `flatten_params` flattened.

    Raises:
      InputError: a name has an empty part, or is both a leaf and a folder of others.
    """
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *folders, last = name.split(".")
        if not all((*folders, last)):
            raise InputError(f"tensor name {name!r} has an empty part between its dots")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise InputError(f"tensor name {name!r} goes through {folder!r}, which is a tensor itself")
        if last in node:
            raise InputError(f"tensor name {name!r} is both a tensor and the beginning of other names")
        node[last] = leaf
    return tree


def load_params(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Read a tree of parameters, NumPy arrays, that must be exactly the one expected.

    Args:
      path: as `read_safetensors` takes it.
      expected: nested dicts of leaves with `shape` and `dtype`, such as `jax.eval_shape(module.init, ...)["params"]`.

    Raises:
      InputError: tensors are missing, not expected, of another shape or dtype, or not finite; the message names them.
    """
    note_weights(path)
    tensors = read_safetensors(path)
    wanted = {name: spec_of(leaf) for name, leaf in flatten_params(expected).items()}
    check_specs(str(path), tensors.specs, wanted)
    params = {}
    for name in wanted:
        params[name] = tensors[name]
        check_finite(str(path), name, params[name])
    return unflatten_params(params)


def spec_of(leaf: Any) -> Spec:
    """Return shape and dtype of anything that has both."""
    return tuple(leaf.shape), np.dtype(leaf.dtype).name


def check_specs(origin: str, found: Mapping[str, Spec], wanted: Mapping[str, Spec]) -> None:
    """Check that names, shapes and dtypes agree in both directions.

    Raises:
      InputError: they do not; the message begins with `origin` and lists what is left over on either side.
    """
    wrong = [
        f"{name} is {_show(found[name])} instead of {_show(spec)}"
        for name, spec in wanted.items()
        if name in found and found[name] != spec
    ]
    missing, unexpected = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if faults := list_faults(missing=missing, not_expected=unexpected, wrong=wrong):
        raise InputError(f"{origin}: not the parameters of this model ({faults}); is it another model's?")


def check_finite(origin: str, name: str, tensor: np.ndarray) -> None:
    """Raise InputError, naming the tensor, unless all its numbers are finite."""
    # A sum is not finite where an element is not, and costs no array of booleans; where it overflows, look again.
    with np.errstate(over="ignore", invalid="ignore"):
        finite = bool(np.isfinite(np.sum(tensor))) or bool(np.isfinite(tensor).all())
    if not finite:
        raise InputError(f"{origin}: {name} holds NaN or infinity; the file is damaged, or its training diverged")


def list_faults(**faults: Collection[str]) -> str:
    """Return "not expected: a, b and 3 more; missing: c": at most MAX_NAMED names of each kind that has any."""
    return "; ".join(
        f"{kind.replace('_', ' ')}: {', '.join(sorted(names)[:MAX_NAMED])}"
        + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
        for kind, names in faults.items()
        if names
    )


def _show(spec: Spec) -> str:
    return f"{spec[1]}[{', '.join(map(str, spec[0]))}]"


def _bytes_of(tensor: Any, spec: Spec) -> memoryview:
    """Return the bytes of a tensor, which must be what was announced, in C order."""
    array = np.asarray(tensor, order="C")
    assert spec_of(array) == spec, f"{spec_of(array)} instead of {spec}"
    return array.reshape(-1).view(np.uint8).data


def _make_header(path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None) -> tuple[bytes, list[str]]:
    """Return the beginning of a file, and the tensors in the order in which their bytes follow."""
    codes = {name: code for code, name in _DTYPES.items()}
    for name, (_, dtype) in specs.items():
        if dtype not in codes:
            raise InputError(f"{path}: {name} is of dtype {dtype}, which a safetensors file cannot hold")
    # The widest first, so that each lies at a multiple of its width.
    names = sorted(specs, key=lambda name: (-np.dtype(specs[name][1]).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        shape, dtype = specs[name]
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, names


def _read_header(path: Path) -> tuple[dict[str, Spec], dict[str, str], dict[str, int]]:
    """Return the specs and the metadata of one file and where each tensor begins; all its bytes are there."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or 8 + length > size:
                raise InputError(f"{path}: truncated, or not a safetensors file ({size:,} bytes); download it again")
            if length > MAX_HEADER_BYTES:
                raise InputError(f"{path}: a header of {length:,} bytes, more than the {MAX_HEADER_BYTES:,} allowed")
            text = file.read(length)
            # Counted before anything is made of them; a file that hides some has fewer bytes for them too.
            if (number := text.count(b'"data_offsets"')) > MAX_TENSORS:
                raise InputError(f"{path}: {number:,} tensors, more than the {MAX_TENSORS:,} allowed")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    try:
        header = parse_json(text)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are no text")
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        starts = {name: 8 + length + int(entry["data_offsets"][0]) for name, entry in header.items()}
        specs = {name: (tuple(entry["shape"]), str(entry["dtype"])) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise InputError(f"{path}: its header cannot be read ({error}); download it again") from error
    if 8 + length + end > size:
        raise InputError(f"{path}: truncated: {size:,} bytes of {8 + length + end:,}; download it again")
    for name, (_, dtype) in specs.items():
        if dtype not in _DTYPES:
            raise InputError(f"{path}: {name} is of dtype {dtype}, which is not supported: save it as F32, F16 or BF16")
    return {name: (shape, _DTYPES[dtype]) for name, (shape, dtype) in specs.items()}, metadata, starts


def _read_index(path: Path, ending: str) -> dict[str, str]:
    """Return which file holds which tensor, having checked that all the files are there, beside the index."""
    weight_map = read_strict_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: has no weight_map, so it is not the index of a sharded model")
    for file in weight_map.values():
        if not isinstance(file, str) or not file.endswith(ending) or {"/", "\\", "\0"} & set(file):
            raise InputError(f"{path}: names {file!r}, but may only name {ending[1:]} files beside itself")
    if faults := list_faults(missing_beside_it={f for f in weight_map.values() if not (path.parent / f).is_file()}):
        raise InputError(f"{path}: {faults}; download the folder again")
    return weight_map


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn what the safetensors package finds wrong into a sentence about the file."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a sound safetensors file ({error}); download it again") from error
