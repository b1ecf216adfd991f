"""One network in two layouts: the state dict of a torch module, and the parameter tree of its linen twin.

    linen leaf            torch name    torch axes
    kernel (D F)          weight        (F D)
    kernel (H W C D)      weight        (D C H W)
    scale, embedding      weight        the same
    bias and others       the same      the same

Folders of the tree are parts of the name; diffusers' trees write `blocks_0` for torch's `blocks.0`, and give the
autoencoder's attention older names. The table is one-to-one, so it leads in both directions.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from jaxdiff.errors import InputError
from jaxdiff.io.weights import Spec, check_finite, check_specs, flatten_params, spec_of

NUMBERED = re.compile(
    r"(?<![^.])(down_blocks|up_blocks|resnets|attentions|downsamplers|upsamplers|transformer_blocks|to_out|net)_(\d+)(?![^.])"
)
"""Folders that torch writes with a dot before the number."""
AUTOENCODER_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Folders below the attention in the middle of an autoencoder, and what torch calls them."""
WEIGHT_LEAVES = ("kernel", "scale", "embedding")
"""Leaves that torch calls `weight`."""
WIDTHS = {np.dtype(kind).name for kind in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)}
"""Types that a stored parameter may have; in memory all become float32."""


def torch_name(name: str) -> str:
    """Return what torch calls the leaf of a flattened tree."""
    *folders, leaf = name.split(".")
    folders = [AUTOENCODER_ATTENTION.get(folder, folder) for folder in folders]
    return NUMBERED.sub(r"\1.\2", ".".join([*folders, "weight" if leaf in WEIGHT_LEAVES else leaf]))


def modern_name(name: str) -> str:
    """Return today's torch name of a tensor of diffusers' Flax classes, or of an autoencoder of before 2023."""
    attention = "|".join(AUTOENCODER_ATTENTION)
    return re.sub(
        rf"(attentions\.\d+)\.({attention})\.",
        lambda match: f"{match[1]}.{AUTOENCODER_ATTENTION[match[2]]}.",
        NUMBERED.sub(r"\1.\2", name),
    )


def torch_axes(name: str, rank: int) -> tuple[int, ...]:
    """Return for each axis of torch's tensor the axis of the leaf."""
    if name.split(".")[-1] == "kernel":
        return {2: (1, 0), 4: (3, 2, 0, 1)}[rank]
    return tuple(range(rank))


def from_torch(
    origin: str,
    tensors: Mapping[str, np.ndarray],
    expected: Mapping[str, Any],
    ignored: str,
    prefix: str = "",
    dtype: DTypeLike = np.float32,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each leaf of a tree under its flattened name, out of a state dict that must fit exactly.

    Args:
      origin: what error messages begin with.
      tensors: by torch name; read one after another, and known by their `specs` where there are any.
      expected: tree of leaves with `shape`.
      ignored: regular expression of whole torch names that are no parameters of this model.
      prefix: beginning of torch names that the state dict leaves out.
      dtype: that the leaves shall have.

    Raises:
      InputError: tensors are missing, not expected, of another shape, not floating-point, not finite or too large for
        `dtype`.
    """
    leaves = flatten_params(expected)
    sources = {name: torch_name(name).removeprefix(prefix) for name in leaves}
    wanted = {}
    for name, leaf in leaves.items():
        axes = torch_axes(name, len(leaf.shape))
        wanted[sources[name]] = tuple(leaf.shape[axis] for axis in axes), "float32"
    specs: Mapping[str, Spec] = getattr(tensors, "specs", None) or {n: spec_of(t) for n, t in tensors.items()}
    stored = {modern_name(name): name for name in specs if not re.fullmatch(ignored, name)}
    found = {modern: as_float32(specs[name]) for modern, name in stored.items()}
    check_specs(origin, found, wanted)
    for name, leaf in leaves.items():
        order = np.argsort(torch_axes(name, len(leaf.shape)))
        # No name here for the tensor, which would keep it beside the next.
        yield name, as_type(origin, sources[name], tensors[stored[sources[name]]].transpose(order), dtype)


def as_type(origin: str, name: str, tensor: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Return a stored parameter in C order and as a type of floating-point numbers.

    Raises:
      InputError: a number of it is not finite, or too large for the type.
    """
    check_finite(origin, name, tensor)
    with np.errstate(over="ignore"):
        cast = np.asarray(tensor, dtype, order="C")
    # No other type here has a largest number that is smaller.
    if cast.dtype == np.float16 and not np.isfinite(cast).all():
        raise InputError(f"{origin}: {name} holds numbers too large for float16: use bfloat16 or float32")
    return cast


def to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the state dict of a tree."""
    leaves = {name: np.asarray(leaf) for name, leaf in flatten_params(params).items()}
    return {torch_name(name): leaf.transpose(torch_axes(name, leaf.ndim)) for name, leaf in leaves.items()}


def as_float32(spec: Spec) -> Spec:
    """Return the spec that a stored parameter has once it is read; what is no floating-point number keeps its own."""
    return spec[0], "float32" if spec[1] in WIDTHS else spec[1]
