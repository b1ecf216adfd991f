"""Which files a command read weights from, and their hashes; importing it costs nothing."""

import hashlib
from pathlib import Path

_weight_files: dict[Path, None] = {}


def forget_weights() -> None:
    """Begin the record of another command."""
    _weight_files.clear()


def note_weights(path: Path) -> None:
    """Remember that the command reads weights from a file."""
    _weight_files[path.resolve()] = None


def weight_files() -> dict[str, str]:
    """Return the SHA-256 of every file that the command read weights from and that is still there, by path."""
    return {str(path): file_sha256(path) for path in _weight_files if path.is_file()}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
