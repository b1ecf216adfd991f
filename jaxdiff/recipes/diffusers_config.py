"""How the config files of diffusers are read; what jaxdiff does not have is refused by name.

A key that a file lacks means the default of the class that the file names, as in diffusers.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxdiff.errors import InputError
from jaxdiff.io.strict_json import decode


def decode_config(origin: str, kind: Any, values: Mapping[str, Any]) -> Any:
    """Return the config of these values, each of the type of its field."""
    try:
        return decode(kind, values)
    except ValueError as error:
        raise InputError(f"{origin}: {error}") from error


def check_class(origin: Path | str, given: dict[str, Any], known: Collection[str]) -> str:
    """Take the entries that every config has out of it, and return its class."""
    kind = given.pop("_class_name", None)
    for name in ("_diffusers_version", "_name_or_path", "_use_default_values"):
        given.pop(name, None)
    if kind not in known:
        raise InputError(f"{origin}: _class_name is {kind!r}; jaxdiff only has {', '.join(known)}")
    return kind


def with_defaults(
    origin: Path | str, given: dict[str, Any], defaults: Mapping[str, Any], fixed: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields that may vary, having checked that the others are as jaxdiff has them."""
    if unknown := sorted(given.keys() - defaults.keys() - fixed.keys()):
        raise InputError(f"{origin}: {unknown[0]} is {given[unknown[0]]!r}, but jaxdiff does not know this key")
    for name, only in fixed.items():
        if given.get(name, only) != only:
            raise InputError(f"{origin}: {name} is {given[name]!r}; jaxdiff only has {only!r}")
    return {name: given.get(name, default) for name, default in defaults.items()}


def look_up(origin: Path | str, name: str, fields: dict[str, Any], table: Mapping[str, Any]) -> Any:
    """Translate one value of few."""
    value = fields[name]
    if not isinstance(value, str) or value not in table:
        raise InputError(f"{origin}: {name} is {value!r}; jaxdiff only has {', '.join(map(repr, table))}")
    return table[value]


def attention_levels(origin: Path | str, kinds: tuple[str, str], down: Any, up: Any) -> list[bool]:
    """Return whether each level attends, having checked that the way up mirrors the way down.

    Args:
      origin: what error messages begin with.
      kinds: of down blocks without and with attention.
      down: what the config says of the levels on the way down.
      up: the same of the way up.
    """
    for kind in down if isinstance(down, list) else [down]:
        if not isinstance(kind, str) or kind not in kinds:
            raise InputError(f"{origin}: down_block_types has {kind!r}; jaxdiff only has {', '.join(kinds)}")
    if up != [kind.replace("Down", "Up") for kind in reversed(down)]:
        raise InputError(f"{origin}: up_block_types is {up!r}, which does not mirror down_block_types, as in jaxdiff")
    return [kind == kinds[1] for kind in down]
