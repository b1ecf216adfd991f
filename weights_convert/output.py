"""The folder that a conversion is written into."""

from collections.abc import Collection
from pathlib import Path

from jaxdiff.errors import InputError
from jaxdiff.io.strict_json import read_strict_json
from jaxdiff.io.weights import read_safetensors


def open_output(folder: Path, kind: str, files: Collection[str]) -> Path:
    """Create or open a folder for a conversion, and return its absolute path.

    Args:
      folder: as the user names it.
      kind: the `format` of config.json.
      files: all that a conversion writes.

    Raises:
      InputError: it cannot be written, or holds anything but an earlier conversion of the same kind.
    """
    folder = folder.expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inside = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise InputError(f"OUT {folder}: cannot be written ({error.strerror}); choose another folder") from error
    known = {name for name in files if name in inside and _format_of(folder / name) == kind}
    if strange := sorted(inside - known - {f"{name}.partial" for name in files}):
        raise InputError(
            f"OUT {folder}: holds {strange[0]}, which is not of an earlier {kind} conversion; choose another folder"
        )
    return folder


def _format_of(path: Path) -> str | None:
    """Return the format that a JSON or safetensors file says it has."""
    try:
        fields = read_strict_json(path) if path.suffix == ".json" else read_safetensors(path).metadata
    except InputError:
        return None
    return fields.get("format")
