"""Adapters that were learned apart, in one model: matrices merged in closed form (arXiv 2212.04488, section 3.2).

    (1)  W = argmin |C_reg (W - W_0)|^2 + ridge |W - W_0|^2,    so that  C W = V        (equation 4)
    (2)  W = W_0 + M^-1 C^T (C M^-1 C^T)^-1 (V - C W_0),        M = C_reg^T C_reg + ridge
    (3)  V - C W_0 = C D

A row of C is what the text encoder makes of a token of a new word; (3) holds for the rows of each adapter with its own
D. Matrices stand to the right of features, as in the parameters. The rows of C_reg are all tokens of captions that have
nothing to do with the new words. The ridge, which the paper lacks, is far below what they span; it keeps W where it was
in directions that no caption takes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxdiff.errors import InputError
from jaxdiff.io.adapters import Adapter, of_all
from jaxdiff.io.learned_embeddings import Learned
from jaxdiff.io.prompts import read_prompts
from jaxdiff.io.tokenizer import CLIPTokenizer
from jaxdiff.recipes.custom_diffusion import with_deltas
from jaxdiff.recipes.learned_words import ids_of_words, spell_out
from jaxdiff.recipes.stable_diffusion import Params, StableDiffusion, encode_texts

RIDGE = 1e-6
"""Of equation (1), as a share of the mean eigenvalue of C_reg^T C_reg."""
LARGEST_MISS = 1e-3
"""Most that C W may differ from V, as a share of the largest entry of V - C W_0."""
TEXT = "a photo of {}"
"""Around a word, when its features are taken."""
THINGS = (
    "a cat|a dog|a horse|a bird|a man|a woman|a child|a crowd|a face|a hand|a house|a street|a city|a room|a chair|"
    "a table|a car|a bicycle|a boat|an aeroplane|a tree|a flower|a forest|a mountain|the sea|a river|the sky|a fruit|"
    "a meal|a cup|a book|a toy|a dress|a hat|a machine|a statue|a lamp|a clock|a bridge|a garden"
)
CAPTIONS = (
    "a photo of {0}",
    "a painting of {0}",
    "a drawing of {0} in front of {1}",
    "{0} next to {1}",
    "{0}, at night",
)
AT_ONCE = 16
Features = Float[np.ndarray, "_ _"]


def everyday_captions() -> list[str]:
    """Return captions of things that are seen every day, some of them in pairs."""
    things = THINGS.split("|")
    pairs = list(zip(things, (*things[1:], things[0])))
    return [text.format(*pair) for text in CAPTIONS for pair in pairs]


def merge_deltas(
    model: StableDiffusion,
    params: Params,
    tokenizer: CLIPTokenizer,
    adapters: Sequence[Adapter],
    captions: Sequence[str],
) -> dict[str, np.ndarray]:
    """Return W - W_0 of equation (2) for every matrix that an adapter changes.

    Args:
      model: from `add_words` with the words of all adapters.
      params: its parameters.
      tokenizer: which knows the words.
      adapters: at least two.
      captions: of C_reg.

    Raises:
      InputError: an adapter has no word, or two ask for different things of the same features.
    """
    length = tokenizer.context_length
    gram = np.zeros((model.unet.config.cross_attention_dim,) * 2)
    encode = jax.jit(lambda params, ids: encode_texts(model, params, ids).astype(jnp.float32))
    for first in range(0, len(captions), AT_ONCE):
        some = list(captions[first : first + AT_ONCE])
        ids = tokenizer(some, length=length, remedy="leave it out of --captions").input_ids
        features = np.asarray(encode(params, ids), np.float64).reshape(-1, len(gram))
        gram += features.T @ features
    own = [features_of_words(model, params, tokenizer, adapter.words) for adapter in adapters]
    merge = make_merge(gram, np.concatenate(own))
    merged = {}
    for name in sorted({name for adapter in adapters for name in adapter.deltas}):
        nothing = np.zeros(next(adapter.deltas[name].shape for adapter in adapters if name in adapter.deltas))
        wanted = [found @ np.float64(adapter.deltas.get(name, nothing)) for adapter, found in zip(adapters, own)]
        merged[name] = merge(np.concatenate(wanted)).astype(np.float32)
    return merged


def with_adapters(
    model: StableDiffusion,
    params: Params,
    tokenizer: CLIPTokenizer,
    adapters: Sequence[Adapter],
    captions: Path | None,
) -> Params:
    """Return the parameters with the matrices that adapters change for all tokens; they have the words already.

    Args are those of `merge_deltas`, except for:
      captions: file of them, one a line; None means everyday ones.

    Raises:
      InputError: as `merge_deltas`, or the file cannot be read.
    """
    whole = [adapter._replace(deltas=of_all(adapter.deltas)) for adapter in adapters]
    adapters = [adapter for adapter in whole if adapter.deltas]
    if len(adapters) < 2:
        if captions is not None:
            raise InputError("--captions has no effect without two --adapters of whole matrices to merge: drop it")
        return with_deltas(params, adapters[0].deltas) if adapters else params
    texts = everyday_captions() if captions is None else read_prompts(captions, "--captions")
    return with_deltas(params, merge_deltas(model, params, tokenizer, adapters, texts))


def make_merge(gram: Float[np.ndarray, "E E"], features: Float[np.ndarray, "s E"]) -> Callable[[Features], Features]:
    """Return equation (2) as a function from V - C W_0 to W - W_0.

    Args:
      gram: C_reg^T C_reg.
      features: C.
    """
    inverse = np.linalg.solve(gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)), features.T)

    def merge(wanted: Features) -> Features:
        # Features of one word may depend on one another, so that this system may be singular, though solvable.
        delta = inverse @ np.linalg.lstsq(features @ inverse, wanted)[0]
        if np.abs(features @ delta - wanted).max() > LARGEST_MISS * np.abs(wanted).max():
            raise InputError(
                "--adapters: what they ask for cannot all be had: two of their words mean nearly the same to the text "
                "encoder. Learn them together in one run"
            )
        return delta

    return merge


def features_of_words(model: StableDiffusion, params: Params, tokenizer: CLIPTokenizer, words: Learned) -> Features:
    """Return the rows of C of one adapter.

    Args:
      model: from `add_words`.
      params: its parameters.
      tokenizer: which knows the words.
      words: of the adapter.

    Raises:
      InputError: there are none.
    """
    if not words:
        raise InputError("--adapters: an adapter without words cannot be merged with others")
    rows = []
    for word, own in zip(words, ids_of_words(tokenizer, words)):
        ids = tokenizer([spell_out(TEXT.replace("{}", word), words)], length=tokenizer.context_length).input_ids
        encoded = np.asarray(encode_texts(model, params, jnp.asarray(ids)).astype(jnp.float32), np.float64)[0]
        rows.append(encoded[np.isin(ids[0], own)])
    return np.concatenate(rows)
