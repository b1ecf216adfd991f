"""Published weights as the user names them: a folder, a file, or a model on the Hugging Face hub."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from jaxdiff.errors import InputError
from jaxdiff.io.hub import FIRST_ASKED, Fetch, open_model
from jaxdiff.io.pretrained_files import read_tensors

Open = Callable[[str], Fetch]
"""From the name of a sub-folder, or nothing for the model's own folder, to how its files are got at."""


def find_source(source: str, fetch_files: Callable[[str, Open], None], revision: str | None = None) -> Path:
    """Return a local path for a path or a hub name, of which the latter's files are fetched into the hub's cache.

    Args:
      source: path, or `owner/name` on the hub; a path that exists comes first.
      fetch_files: asks for every file that the conversion needs, given the source and its folders.
      revision: branch, tag or commit on the hub.

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
    folder = _find_folder(source, open_model(source, revision))
    fetch_files(source, lambda part: open_model(source, revision, part))
    return folder


def _find_folder(source: str, fetch: Fetch) -> Path:
    """Return where the hub's client puts a model's files."""
    first, second = reversed(FIRST_ASKED)
    try:
        path = fetch(first) or fetch(second)
    except InputError:
        # Without a network, what the cache does not hold is an error; a model that has the one may lack the other.
        path = fetch(second)
    if path is None:
        raise InputError(
            f"{source}: has neither {first} nor {second}, so it is no model of diffusers; if it holds a single file, "
            "download that and name it"
        )
    return path.parent


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of all bytes of the files that an index names, in the order of their names."""
    total = hashlib.sha256()
    for file in getattr(read_tensors(path), "files", [path]) if path.suffix == ".json" else [path]:
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                total.update(chunk)
    return total.hexdigest()
