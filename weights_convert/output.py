"""The folder that a conversion is written into."""

from collections.abc import Collection
from pathlib import Path

from jaxdiff.errors import InputError
from jaxdiff.io.runs import check_writable
from jaxdiff.io.strict_json import read_strict_json
from jaxdiff.io.weights import TensorFile


def check_output(folder: Path, kind: str, files: Collection[str]) -> Path:
    """Check, before anything long begins, that a folder is free for a conversion; return its absolute path.

    Args:
      folder: as the user names it.
      kind: the `format` that both config.json and the metadata of the safetensors state.
      files: names of all that a conversion writes.

    Raises:
      InputError: it cannot be written, or holds anything but an earlier conversion of the same kind.
    """
    check_writable(folder, "OUT")
    folder = folder.expanduser().resolve()
    inside = {path.name for path in folder.iterdir()} if folder.exists() else set()
    known = {name for name in files if name in inside and _format_of(folder / name) == kind}
    if strange := sorted(inside - known - {f"{name}.partial" for name in files}):
        raise InputError(
            f"OUT {folder}: holds {strange[0]}, which is not of an earlier {kind} conversion; choose another folder"
        )
    return folder


def _format_of(path: Path) -> str | None:
    """Return the format that a JSON or safetensors file says it has."""
    try:
        return (read_strict_json(path) if path.suffix == ".json" else TensorFile(path).metadata).get("format")
    except InputError:
        return None
