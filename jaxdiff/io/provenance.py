"""What a result came from: versions, machine, command line, and hashes of arrays."""

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import jaxdiff

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


def versions(device: str) -> dict[str, str]:
    """Return the versions of everything that decides a result, and the machine."""
    found = {"jaxdiff": jaxdiff.__version__, **{name: metadata.version(name) for name in PACKAGES}}
    return {**found, "python": platform.python_version(), "platform": platform.platform(), "device": device}


def command_line() -> str:
    """Return the command as a shell takes it: `python -m jaxdiff.NAME`, `jaxdiff NAME` or `python SCRIPT`."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        words = ["python", "-m", program.parent.name]
    elif program.resolve().parent == Path(__file__).resolve().parent.parent:
        words = ["python", "-m", f"jaxdiff.{program.stem}"]
    else:
        words = ["python", str(program)] if program.suffix == ".py" else [program.name]
    return shlex.join([*words, *sys.argv[1:]])


def tree_hash(tree: Any) -> str:
    """Return the SHA-256 of nested dicts of arrays: names, dtypes, shapes and bytes, in order of name.

    Raises:
      TypeError: a leaf is no array of numbers.
    """
    digest = hashlib.sha256()

    def add(names: tuple[str, ...], node: Any) -> None:
        if isinstance(node, Mapping):
            # JSON keeps {"a/b": x} apart from {"a": {"b": x}}, and an empty dict leaves its mark.
            digest.update(json.dumps([*names, sorted(node)]).encode())
            for name in sorted(node):
                add((*names, name), node[name])
            return
        array = np.asarray(node)
        if array.dtype.hasobject:
            raise TypeError(f"{'/'.join(names)}: only arrays of numbers can be hashed, got {type(node).__name__}")
        digest.update(json.dumps([*names, str(array.dtype), array.shape]).encode())
        digest.update(array.tobytes())

    add((), tree)
    return digest.hexdigest()
