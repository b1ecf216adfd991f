"""Parameter trees in the msgpack files of flax, read one array at a time.

flax.serialization.msgpack_restore takes a file's bytes as a whole, and so twice the memory of the parameters, besides
JAX. A file is a msgpack map of maps whose leaves are extensions of type 1: shape, name of the dtype, bytes. An array of
more than a gigabyte is a map of its pieces.
"""

from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from jaxdiff.errors import InputError

NDARRAY, NUMBER = 1, 3
"""Types of flax's extensions that hold arrays; the latter's have no axes."""
CHUNKED = "__msgpack_chunked_array__"
READ_BYTES = 2**20


def read_msgpack(path: Path) -> dict[str, Any]:
    """Return the tree in a file that flax wrote, as nested dicts of arrays.

    Raises:
      InputError: it cannot be read, or holds no tree.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            # The limits only keep a hostile file from claiming more than it has.
            limit = max(size, 1)
            unpacker = msgpack.Unpacker(
                file,
                read_size=min(READ_BYTES, limit),
                max_buffer_size=limit,
                ext_hook=_read_array,
                strict_map_key=False,
            )
            tree = unpacker.unpack()
            if unpacker.tell() != size:
                raise ValueError(f"{size - unpacker.tell():,} bytes follow its end")
        tree = _join_chunks(tree)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except (ValueError, TypeError, KeyError, RecursionError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{path}: truncated, or not a msgpack file of flax ({reason}); get it again") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: must hold a tree of parameters, holds a {type(tree).__name__}")
    return tree


def _read_array(kind: int, data: bytes) -> np.ndarray:
    """Return the array that an extension holds."""
    if kind not in (NDARRAY, NUMBER):
        raise ValueError(f"an extension of type {kind}")
    shape, dtype, buffer = msgpack.unpackb(data, raw=True)
    width = ml_dtypes.bfloat16 if dtype == b"bfloat16" else np.dtype(dtype.decode())
    return np.frombuffer(buffer, width).reshape(shape)


def _join_chunks(tree: Any) -> Any:
    """Return a tree in which arrays in pieces are whole."""
    if not isinstance(tree, dict):
        return tree
    if CHUNKED not in tree:
        return {name: _join_chunks(node) for name, node in tree.items()}
    shape, chunks = ([tree[name][str(i)] for i in range(len(tree[name]))] for name in ("shape", "chunks"))
    return np.concatenate(chunks).reshape(shape)
