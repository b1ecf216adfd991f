"""What a device would hold, before anything is put on it, and the sentence where that does not fit."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

from jaxdiff.errors import InputError, wants_memory

WEIGHTS, TOTAL = "weights", "in all, at the most"
Sizes = dict[str, int]
"""Bytes that a device holds, by what for."""


def estimate_memory(params: Any, programs: Mapping[str, jax.stages.Lowered]) -> Sizes:
    """Return what a device would hold: the weights, what each program needs beside them, and both at the most.

    The programs are compiled, not run, so the figures are those of this machine and its devices.
    """
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    beside: Sizes = {}
    for name, program in programs.items():
        analysis: Any = program.compile().memory_analysis()
        beside[name] = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    return {WEIGHTS: weights, **beside, TOTAL: weights + max(beside.values())}


def list_memory(sizes: Sizes) -> str:
    """Return the lines that --dry-run prints."""
    return "\n".join(f"{name:<32} {size / 1e9:8.2f} GB" for name, size in sizes.items())


@contextmanager
def explain_want_of_memory(estimate: Callable[[], Sizes], lower: str) -> Iterator[None]:
    """Have a device or a machine that runs out of memory told in one sentence.

    Args:
      estimate: what it would take.
      lower: the flags that make it less.

    Raises:
      InputError: memory does not suffice.
    """
    try:
        yield
    except Exception as error:
        if not wants_memory(error):
            raise
        sizes = estimate()
        raise InputError(
            f"out of memory: a device would hold about {sizes[TOTAL] / 1e9:.2f} GB, of which the weights take "
            f"{sizes[WEIGHTS] / 1e9:.2f} GB; {lower} (--dry-run lists it)"
        ) from error
