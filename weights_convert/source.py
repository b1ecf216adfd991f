"""Published weights as the user names them: a folder, a file, or a model on the Hugging Face hub."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.io.torch_files import read_state_dict
from jaxdiff.io.weights import ShardedTensors, read_safetensors

DOWNLOADED = ("*config.json", "model_index.json")
"""Small files, downloaded in any case; weights only as the caller names them."""
DOUBLES = ("*.fp16.*", "*non_ema*", "*/*/*")
"""Copies of the weights in another precision or state, and what lies deeper than any file we read."""


def find_source(
    source: str, weights: Sequence[Sequence[str]], revision: str | None = None, small: Sequence[str] = ()
) -> Path:
    """Return a local path for a path or a hub name, downloading the latter's configs and weights into the hub's cache.

    Args:
      source: path, or `owner/name` on the hub; a path that exists comes first.
      weights: patterns of the files that hold weights, the best format first; another is only downloaded where the
        hub has no file of the first.
      revision: branch, tag or commit on the hub.
      small: patterns of further files, downloaded in any case.

    Raises:
      InputError: nothing is there, or the hub does not answer; or a revision of something local was asked for.
    """
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise InputError(f"--revision {revision} has no effect on {source}, which is on this machine: drop it")
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise InputError(f"{source}: no such file or folder, nor owner/name of a model on the hub")
    from huggingface_hub import snapshot_download

    for patterns in weights:
        try:
            wanted = [*DOWNLOADED, *small, *patterns]
            folder = snapshot_download(source, revision=revision, allow_patterns=wanted, ignore_patterns=list(DOUBLES))
        except Exception as error:  # the hub's client raises many types, of several packages
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{source}: no such folder here, and the hub did not give it ({reason}); where there is no network, "
                "download the model's folder elsewhere, copy it here and name the folder"
            ) from error
        if any(path for pattern in patterns for path in Path(folder).glob(pattern)):
            break
    return Path(folder)


def find_weights(folder: Path, names: Sequence[str]) -> Path:
    """Return the first of `names` that a folder has.

    Raises:
      InputError: it has none.
    """
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise InputError(f"{folder}: holds none of {', '.join(names)}")
    return found[0]


def read_tensors(path: Path) -> Mapping[str, np.ndarray]:
    """Open a file of tensors, safetensors (sharded too) or torch's, by its name.

    Raises:
      InputError: as `read_safetensors` and `read_state_dict`.
    """
    return read_safetensors(path) if path.suffix in (".safetensors", ".json") else read_state_dict(path)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of all bytes of the files that an index names, in the order of their names."""
    tensors = read_safetensors(path) if path.name.endswith(".index.json") else None
    total = hashlib.sha256()
    for file in tensors.files if isinstance(tensors, ShardedTensors) else [path]:
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                total.update(chunk)
    return total.hexdigest()
