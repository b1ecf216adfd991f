"""Custom Diffusion: keys and values of the text are learned beside the new words (arXiv 2212.04488, section 3.1).

    (1)  K = c (W_K + D_K),   V = c (W_V + D_V)        in every attention from pixels to a text c

The D of (1) start at zero and are all that changes in the UNet. They are float32 whatever the network computes in,
because a step is far smaller than what bfloat16 tells apart. diffusers' trainer lets no gradient through the keys and
values of the begin token; the paper does not ask for that, and here they are learned from as all others.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.errors import InputError
from jaxdiff.io.adapters import OF, Adapter, Deltas, read_adapter
from jaxdiff.io.learned_embeddings import Learned
from jaxdiff.io.provenance import tree_hash
from jaxdiff.io.weights import flatten_params, write_safetensors
from jaxdiff.models.spatial_transformer import TEXT_ATTENTION
from jaxdiff.recipes.learned_words import first_rows, get_leaf, set_leaf
from jaxdiff.recipes.stable_diffusion import Params

DIFFUSERS_FILE = "pytorch_custom_diffusion_weights.safetensors"
"""As diffusers' `load_attn_procs` names it."""
Trained = Mapping[str, Float[Array | np.ndarray, "_ _"]]
"""Words with their vectors, and matrices of the UNet with what is added to them, by name."""


KEY, VALUE = (f"{TEXT_ATTENTION}.{name}.kernel" for name in ("to_k", "to_v"))
"""Ends of the names of W_K and W_V of equation (1)."""


def text_matrices(params: Params) -> list[str]:
    """Return the names of W_K and W_V of equation (1) within the UNet, their parts joined with dots."""
    return sorted(name for name in flatten_params(params["unet"]) if name.endswith((KEY, VALUE)))


def zero_deltas(params: Params) -> dict[str, np.ndarray]:
    """Return the D of equation (1) that change nothing; `params` may be shapes."""
    flat = flatten_params(params["unet"])
    return {name: np.zeros(flat[name].shape, np.float32) for name in text_matrices(params)}


def with_deltas(params: Params, deltas: Trained | Deltas) -> Params:
    """Return the parameters with what was learned added to the matrices of the UNet."""
    for name, delta in deltas.items():
        path = ("unet", *name.split("."))
        before = get_leaf(params, path)
        params = set_leaf(params, path, (before.astype(jnp.float32) + delta).astype(before.dtype))
    return params


def split_trained(trained: Trained, words: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the vectors of the words, in their order, and the matrices."""
    return {word: trained[word] for word in words}, {name: trained[name] for name in trained if name not in words}


def base_hash(params: Params, vocab_size: int) -> str:
    """Return the hash of text encoder and UNet that says which model an adapter belongs to.

    It is that of the weights in bfloat16, and so the same whatever the networks compute in.

    Args:
      params: of the model, perhaps with rows of learned words.
      vocab_size: tokens of the model's own.
    """
    params = first_rows(params, vocab_size)
    parts = {name: params[name] for name in ("text_encoder", "unet")}
    return tree_hash(jax.tree.map(lambda leaf: np.asarray(jnp.asarray(leaf, jnp.bfloat16)), parts))


def read_adapters(paths: Sequence[Path], params: Params, vocab_size: int) -> list[Adapter]:
    """Read the adapters of a model of so many tokens.

    Raises:
      InputError: one cannot be read, was learned with another model, or teaches a word that another does too.
    """
    if not paths:
        return []
    base, shapes = (
        base_hash(params, vocab_size),
        {name: leaf.shape for name, leaf in flatten_params(params["unet"]).items()},
    )
    adapters: list[Adapter] = []
    for path in paths:
        adapter = read_adapter(path)
        if adapter.base != base:
            raise InputError(
                f"--adapters {path}: learned with the model of hash {adapter.base}, but this model's is {base}: "
                "use the model that it was learned with, from files of the same precision"
            )
        for name, delta in adapter.deltas.items():
            *word, matrix = name.rsplit(OF, 1)
            if shapes.get(matrix) != delta.shape:
                raise InputError(f"--adapters {path}: the UNet has no {matrix} of that shape; the file is damaged")
            if word and not (word[0] in adapter.words and matrix.endswith(VALUE)):
                raise InputError(f"--adapters {path}: {name} is nothing that a word of its own may have; it is damaged")
        if twice := sorted(adapter.words.keys() & words_of(adapters).keys()):
            raise InputError(f"--adapters {path}: {twice[0]} is in another of them too")
        adapters.append(adapter)
    return adapters


def words_of(adapters: Sequence[Adapter]) -> Learned:
    """Return the words of all adapters."""
    return {word: rows for adapter in adapters for word, rows in adapter.words.items()}


def write_for_diffusers(path: Path, params: Params, deltas: Deltas) -> None:
    """Write the matrices as diffusers' `unet.load_attn_procs(folder, weight_name=FILE, _pipeline=pipeline)` reads them.

    diffusers 0.42 leaves the UNet as it is, without a word, unless it is given the pipeline. It wants every attention
    named, those that were not learned with nothing, which here is a tensor of no numbers.
    """
    flat = flatten_params(params["unet"])

    def attention(name: str) -> str:
        return re.sub(r"_(\d+)", r".\1", name.rsplit(".", 2)[0]) + ".processor"

    tensors = {attention(name): np.zeros(0, np.float32) for name in flat if name.endswith("attn1.to_k.kernel")}
    for name in text_matrices(params):
        matrix = np.asarray(flat[name], np.float32) + deltas.get(name, np.float32(0))
        tensors[f"{attention(name)}.{name.split('.')[-2]}_custom_diffusion.weight"] = np.ascontiguousarray(matrix.T)
    write_safetensors(path, tensors)
