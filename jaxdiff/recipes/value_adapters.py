"""Token-wise value adapters: a concept changes the values of its own tokens alone (ConceptSplit, arXiv 2510.04668).

    (1)  V' = V + sum_i delta_i A_i(c_i),   A_i(c) = c D_i      in every attention from pixels to a text c
    (2)  V' = [c | m_1 c | m_2 c | ...] [W_V; D_1; D_2; ...]
    (3)  K' = [c | m_1 c | m_2 c | ...] [W_K; 0; 0; ...] = K

delta_i of (1) picks the tokens of concept i. So all keys, and the values of all other tokens, are the model's own, and
concepts that were learned apart work together as they are: nothing is merged. (2) and (3), with m_i = 1 at the tokens
of concept i and 0 elsewhere, are (1) in networks that do not change: texts have longer vectors, matrices more rows.
The D of (1) start at zero and, as in the paper, are all that is learned: the word itself stays its initialiser.
They are whole matrices; the authors' are products of two of rank 32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdiff.io.adapters import OF, Adapter, Deltas, of_words
from jaxdiff.io.tokenizer import CLIPTokenizer
from jaxdiff.io.weights import flatten_params
from jaxdiff.recipes.custom_diffusion import VALUE, Trained, text_matrices
from jaxdiff.recipes.learned_words import get_leaf, ids_of_words, set_leaf
from jaxdiff.recipes.stable_diffusion import Params, StableDiffusion


def zero_values(params: Params, words: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the D of equation (1) that change nothing, of each word; `params` may be shapes."""
    flat = flatten_params(params["unet"])
    names = [name for name in text_matrices(params) if name.endswith(VALUE)]
    return {f"{word}{OF}{name}": np.zeros(flat[name].shape, np.float32) for word in words for name in names}


def with_values(params: Params, deltas: Trained | Deltas, words: Sequence[str]) -> Params:
    """Return the parameters with the matrices of equations (2) and (3).

    Args:
      params: of the model.
      deltas: from `of_words`; an attention that a word has none for is left as it is for that word.
      words: in the order of `StableDiffusion.own_values`.
    """
    for name in text_matrices(params):
        path = ("unet", *name.split("."))
        matrix = get_leaf(params, path)
        nothing = jnp.zeros_like(matrix)
        parts = [jnp.asarray(deltas.get(f"{word}{OF}{name}", nothing), matrix.dtype) for word in words]
        params = set_leaf(params, path, jnp.concatenate([matrix, *parts]))
    return params


def give_values(model: StableDiffusion, tokenizer: CLIPTokenizer, words: Mapping[str, Any]) -> StableDiffusion:
    """Return the model in which these words, with their vectors, have values of their own."""
    return replace(model, own_values=ids_of_words(tokenizer, words))


def with_value_adapters(
    model: StableDiffusion, params: Params, tokenizer: CLIPTokenizer, adapters: Sequence[Adapter]
) -> tuple[StableDiffusion, Params]:
    """Return the model and its parameters with the values of all adapters, whose words they have already."""
    deltas = {name: delta for adapter in adapters for name, delta in of_words(adapter.deltas).items()}
    with_own = {name.rsplit(OF, 1)[0] for name in deltas}
    words = {word: rows for adapter in adapters for word, rows in adapter.words.items() if word in with_own}
    if not words:
        return model, params
    return give_values(model, tokenizer, words), with_values(params, deltas, list(words))
