"""The run folder: its config, what may be deleted in it, results.json; beside metrics.jsonl and TensorBoard files."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jaxdiff.errors import InputError
from jaxdiff.io.metrics import METRICS
from jaxdiff.io.provenance import command_line, versions
from jaxdiff.io.run_lock import hold_folder
from jaxdiff.io.strict_json import read_strict_json
from jaxdiff.io.weight_files import weight_files
from jaxdiff.processes import is_leader

CONFIG = "config.json"
RESULTS = "results.json"
DATA = "data.json"
BEST_SCORED = "best_scored"
Figures = dict[str, float | int]
"""Figures under the plain names that results.json gives them."""
MADE_BY_SAMPLING = (
    "shards", "samples", "grid.png", "grid_*.png", "reverse_*.png", "learned_embeds.safetensors",
    "learned_embeds_[0-9]*.safetensors",
    "adapter.safetensors", "pytorch_custom_diffusion_weights.safetensors", RESULTS, "report.html"
)  # fmt: skip
MADE_BY_TRAINING = ("checkpoints", BEST_SCORED, "judge", "judge.json", DATA, "tensorboard", "grids", METRICS, CONFIG)
"""In the order of deletion: the config, which tells a run from any other folder, goes last."""


def open_run(folder: Path, config: Mapping[str, Any], free: Collection[str] = (), start_over: bool = False) -> Path:
    """Create or open a run folder for this process alone, check that it holds this run, return its absolute path.

    Args:
      folder: run folder.
      config: from `as_json`.
      free: fields that may change between the parts of one run.
      start_over: delete what an earlier run left there.

    Raises:
      InputError: the folder cannot be written, another process writes there, another config started its run, or it
        is to be started over but holds things that no run of jaxdiff left there.
    """
    folder = make_folder(folder)
    if start_over:
        _delete_run(folder, config)
    check_config(folder, config, free)
    write_json(folder / CONFIG, config)
    return folder


def _delete_run(folder: Path, config: Mapping[str, Any]) -> None:
    """Delete what an earlier run left in its folder; a folder without a run is left alone."""
    trained = [folder / name for name in MADE_BY_TRAINING if (folder / name).exists()]
    if not trained:
        return
    if not ((folder / CONFIG).is_file() and _is_alike(read_json(folder / CONFIG), config)):
        raise InputError(
            f"--out {folder}: has no {CONFIG} of a run, so {', '.join(path.name for path in trained)} there may not be "
            "jaxdiff's to delete; choose another folder"
        )
    sampled = [path for name in MADE_BY_SAMPLING for path in folder.glob(name)]
    for path in sampled + trained:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_alike(old: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Tell a run's config, perhaps of another version, from another program's config.json by its fields."""
    return 2 * len(old.keys() & config.keys()) > len(config)


def check_writable(folder: Path, flag: str = "--out") -> None:
    """Check, writing nothing, that a folder can be made or written, before anything long begins.

    Args:
      folder: as the user names it.
      flag: by which the user names it.

    Raises:
      InputError: it cannot; what this misses, `make_folder` finds.
    """
    folder = folder.expanduser().absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise InputError(f"{flag} {folder}: cannot be written, because {nearest} is not a folder open to you")


def make_folder(folder: Path) -> Path:
    """Create a folder, prove that it can be written, hold it until this process ends, and return its absolute path.

    Of several processes of one command the first holds it for all.

    Raises:
      InputError: it is a file, not writable, or held by another process.
    """
    folder = folder.expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from error
    if is_leader():
        hold_folder(folder)
    return folder


def read_run(folder: Path, config_class: type) -> tuple[Path, Any]:
    """Return a run folder's absolute path and the config that started the run.

    Raises:
      InputError: there is no run in the folder, or its config is not one of this version.
    """
    folder = folder.expanduser().resolve()
    if not (folder / CONFIG).is_file():
        raise InputError(f"--run {folder}: no {CONFIG} there; give the --out folder of a train_cfg run")
    flat = read_json(folder / CONFIG)
    if "format" in flat:
        raise InputError(
            f"--run {folder}: converted weights have no classes to judge; draw them with "
            f"`python -m jaxdiff.ddim_grid --weights {folder}`"
        )
    try:
        if not _is_alike(flat, as_json(config_class())):
            raise InputError("most fields are missing")
        return folder, from_json(config_class, flat)
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG}: not the config of a train_cfg run ({error})") from error


def last_run(parent: Path) -> Path | None:
    """Return the run of train_cfg directly under a folder whose checkpoints changed last, or None."""
    runs = [path.parent for path in parent.glob("*/checkpoints") if (path.parent / CONFIG).is_file()]
    return max(runs, key=lambda run: (run / "checkpoints").stat().st_mtime, default=None)


def as_json(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain JSON values, nested groups flattened into one level as its flags are."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= as_json(value)
        else:
            flat[field.name] = value
    return json.loads(json.dumps(flat, default=str))  # paths are what JSON lacks


def from_json(config_class: type, flat: Mapping[str, Any]) -> Any:
    """Rebuild a config dataclass from `as_json`; fields that a later version added keep their defaults.

    Raises:
      TypeError, ValueError: a value does not fit its field.
    """
    values: dict[str, Any] = {}
    types = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        default = getattr(config_class(), field.name)
        if dataclasses.is_dataclass(default):
            values[field.name] = from_json(type(default), flat)
        elif field.name in flat:
            value = flat[field.name]
            value = tuple(value) if isinstance(value, list) else value
            choices = get_args(types[field.name]) if get_origin(types[field.name]) is Literal else (value,)
            if value not in choices:
                raise ValueError(f"{field.name} is {value!r}, not one of {', '.join(map(repr, choices))}")
            values[field.name] = Path(flat[field.name]) if isinstance(default, Path) else value
    return config_class(**values)


def check_config(folder: Path, config: Mapping[str, Any], free: Collection[str]) -> None:
    """Check that a folder holds no run yet, or this one.

    Args:
      folder: run folder, which need not exist.
      config: from `as_json`.
      free: fields that may change between the parts of one run.

    Raises:
      InputError: another config started this run; the message names every differing field.
    """
    path = folder.expanduser() / CONFIG
    if path.exists():
        old = read_json(path)
        if not _is_alike(old, config):
            raise InputError(f"{path} is not the config of a run; choose another --out")
        differing = [
            f"{name} was {old.get(name)!r}, is {config.get(name)!r}"
            for name in sorted({*old, *config} - set(free))
            if old.get(name) != config.get(name)
        ]
        if differing:
            raise InputError(
                f"{folder} holds a run with another config: {'; '.join(differing)}. "
                "Choose another --out, or start over with --resume never"
            )


def check_same_data(folder: Path, found: Mapping[str, Any], what: str = "the pictures of --data") -> None:
    """Write data.json, the data check, or, where a run already has one, check that it goes on with the same pictures.

    Args:
      folder: of the run.
      found: what the check found, the "sha256" of it all among it.
      what: it is that is hashed, and by which flag the user names it.

    Raises:
      InputError: the run began with something else.
    """
    path = folder / DATA
    if path.exists() and read_json(path).get("sha256") != found["sha256"]:
        raise InputError(
            f"{folder}: {what} are not those that this run began with. "
            "Choose another --out, or start over with --resume never"
        )
    write_json(path, found)


def data_hash(folder: Path) -> str:
    """Return the "sha256" of what a run was trained with, from `check_same_data`.

    Raises:
      InputError: its data.json is missing, or not one.
    """
    found = read_json(folder / DATA).get("sha256")
    if not isinstance(found, str):
        raise InputError(f"{folder / DATA}: has no sha256, so it is not train_cfg's; run train_cfg again")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
      InputError: the file is missing, or holds no JSON object, or one that names something twice.
    """
    return read_strict_json(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object, whole or not at all.

    Raises:
      ValueError: a number in it is not finite.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)


def write_results(
    folder: Path,
    figures: Mapping[str, Any],
    config: Mapping[str, Any],
    hashes: Mapping[str, str],
    device: str,
) -> Path:
    """Write results.json: the figures under their plain names, then config, versions, hashes and command line.

    Beside the hashes given stand those of all files that the command read weights from.
    """
    path = folder / RESULTS
    hashes = {**hashes, **weight_files()}
    about = {"config": config, "versions": versions(device), "hashes": hashes, "command": command_line()}
    write_json(path, {**figures, **about})
    return path
