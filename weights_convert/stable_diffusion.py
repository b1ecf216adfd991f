"""Stable Diffusion 1.x and 2.x: a pipeline's folder from a single file, a single file from a folder.

    python -m weights_convert stable_diffusion v1-5-pruned.safetensors weights/sd15
    python -m weights_convert stable_diffusion weights/sd15 sd15.safetensors

SOURCE is a single file in CompVis' names (.safetensors, .ckpt), or a folder or hub name of diffusers with weights in
safetensors or torch's .bin, in shards or whole, or in Flax's msgpack. OUT ending in .safetensors is a single file, as
A1111 and ComfyUI open; else it is a folder of diffusers, as jaxdiff opens too. Weights keep their width and their bits,
and one tensor at a time is in memory, but for msgpack files, which are read as a whole.
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.io.runs import check_writable
from jaxdiff.io.weights import TensorFile
from weights_convert.sd_configs import Pipeline
from weights_convert.sd_folder import (
    check_no_added_words,
    fetch_folder,
    find_tokenizer,
    is_conversion,
    move_into_place,
    read_folder,
    read_own_tokenizer,
    write_folder,
)
from weights_convert.sd_single_file import MARK, read_single_file, write_single_file
from weights_convert.source import find_source

SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth")
DEFAULT_TOKENIZER = "openai/clip-vit-large-patch14"
"""The vocabulary of all of these models."""


def run(
    source: str,
    out: Path,
    revision: str | None = None,
    tokenizer: str | None = None,
    ema: bool = False,
    prediction_type: str | None = None,
) -> list[Path]:
    """Convert one model and return the paths that were written.

    Raises:
      InputError: the source is missing, damaged or another kind of model, or OUT holds something else.
    """
    out = check_out(out)
    to_file = out.suffix == ".safetensors"
    path = find_source(source, fetch_folder, revision)
    # Only to compare: the hub's cache has links to files whose names end in nothing.
    place = path.resolve()
    if out == place or out in place.parents or place in out.parents:
        raise InputError(f"OUT {out}: is SOURCE, inside it or around it; choose another place")
    if path.is_dir():
        given = {"--tokenizer": tokenizer, "--ema": ema, "--prediction-type": prediction_type}
        if ignored := [flag for flag, value in given.items() if value]:
            raise InputError(f"{ignored[0]} has no effect on {source}, a folder, which has its own: drop it")
        pipeline = read_folder(path)
        if to_file:
            check_no_added_words(path)
        files = {} if to_file else read_own_tokenizer(path, pipeline.layout)
    else:
        if path.suffix not in SINGLE_FILES:
            raise InputError(f"{source}: neither a folder nor a file that ends in {', '.join(SINGLE_FILES)}")
        if to_file and tokenizer is not None:
            raise InputError(f"--tokenizer has no effect on {out.name}, a single file, which holds none: drop it")
        pipeline = read_single_file(path, ema, prediction_type)
        files = {} if to_file else find_tokenizer(tokenizer or DEFAULT_TOKENIZER, pipeline.layout)
    describe(source, pipeline, to_file)
    check_space(out, pipeline)
    out.parent.mkdir(parents=True, exist_ok=True)
    if to_file:
        write_single_file(out, source, pipeline)
        return [out]
    with staged(out) as folder:
        written = [file.relative_to(folder) for file in write_folder(folder, pipeline, files)]
    return [out / file for file in written]


def check_out(out: Path) -> Path:
    """Check, before anything long begins, that OUT is free, or holds an earlier conversion; return its absolute path.

    Raises:
      InputError: it cannot be written, or holds something else.
    """
    out = out.expanduser().resolve()
    if out.suffix in SINGLE_FILES[1:]:
        raise InputError(f"OUT {out}: pickles are not written; end it in .safetensors")
    check_writable(out.parent if out.suffix == ".safetensors" else out, "OUT")
    if out.suffix == ".safetensors":
        free = not out.exists() or (out.is_file() and is_own_file(out))
    else:
        free = not out.exists() or not any(out.iterdir()) or is_conversion(out)
    if not free:
        raise InputError(f"OUT {out}: is there, and not of an earlier conversion; choose another name")
    return out


def is_own_file(path: Path) -> bool:
    """Tell whether a single file is an earlier conversion."""
    try:
        return MARK.items() <= TensorFile(path).metadata.items()
    except InputError:
        return False


def check_space(out: Path, pipeline: Pipeline) -> None:
    """Check that the disk holds the weights.

    Raises:
      InputError: it does not.
    """
    specs = [spec for network in pipeline.networks.values() for spec in network.specs.values()]
    needed = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in specs)
    there = next(path for path in out.parents if path.exists())
    if needed > (free := shutil.disk_usage(there).free):
        raise InputError(f"OUT {out}: takes {needed:,} bytes, but only {free:,} are free in {there}")


def describe(source: str, pipeline: Pipeline, to_file: bool) -> None:
    """Print what is converted, and what programs cannot tell from a single file."""
    specs = [spec for network in pipeline.networks.values() for spec in network.specs.values()]
    widths = ", ".join(sorted({dtype for _, dtype in specs}))
    prediction_type = pipeline.scheduler.get("prediction_type", "epsilon")
    print(
        f"{source}: Stable Diffusion {pipeline.layout.version}.x, {sum(math.prod(shape) for shape, _ in specs):,} "
        f"parameters in {widths}, {prediction_type}"
    )
    if to_file and pipeline.layout.version == 1 and prediction_type != "epsilon":
        print("  of 1.x, programs that read single files assume epsilon: tell them that it is v")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Lend a folder beside another, whose name it gets when all is written; nothing is left of what fails."""
    made = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    try:
        yield made
        move_into_place(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
