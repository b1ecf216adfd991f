"""JSON of which nothing is guessed or ignored: no name twice, no unknown field, no value of another type."""

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jaxdiff.errors import InputError

MAX_JSON_BYTES = 2**25
"""Longest file that is parsed: the largest published models have an index of a few megabytes."""


def parse_json(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object in which no object has a name twice.

    Raises:
      ValueError: it is no such JSON.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"the name {name!r} stands there twice")
            found[name] = value
        return found

    try:
        value = json.loads(text, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} instead of an object")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds {error.object[error.start]!a}, half of a character") from error
    return value


def read_strict_json(path: Path) -> dict[str, Any]:
    """Read a file for `parse_json`.

    Raises:
      InputError: missing, too large, or no such JSON.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: larger than the {MAX_JSON_BYTES:,} bytes allowed")
        return parse_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def decode(kind: Any, value: Any, name: str = "") -> Any:
    """Return a JSON value as the type that an annotation asks for.

    Args:
      kind: a dataclass, a Literal, a union with None, `tuple[X, ...]`, bool, int, float or str.
      value: as `parse_json` returns it.
      name: of the value, for the message; empty for the whole file.

    Raises:
      ValueError: it is of another type, lacks a field, or has one that is not known.
    """
    if dataclasses.is_dataclass(kind):
        return _decode_fields(kind, value, name)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else decode(next(arg for arg in args if arg is not type(None)), value, name)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(decode(args[0], item, name) for item in value)
    if origin is Literal and any(type(value) is type(choice) and value == choice for choice in args):
        return value
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if kind in (bool, int, str) and type(value) is kind:
        return value
    wanted = f"one of {', '.join(map(repr, args))}" if origin is Literal else getattr(kind, "__name__", str(kind))
    raise ValueError(f"{name} is {value!r}, not {wanted}")


def _decode_fields(kind: Any, value: Any, name: str) -> Any:
    """Return a dataclass from an object that has exactly its fields."""
    if not isinstance(value, dict):
        raise ValueError(f"{name or 'it'} is {value!r}, not an object")
    hints, prefix = get_type_hints(kind), f"{name}." if name else ""
    for fault, names in (("lacks", hints.keys() - value.keys()), ("has unknown", value.keys() - hints.keys())):
        if names:
            raise ValueError(f"it {fault} {', '.join(prefix + field for field in sorted(names))}")
    return kind(**{field: decode(hints[field], value[field], prefix + field) for field in hints})
