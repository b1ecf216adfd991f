"""Textual inversion: learn the embedding of a new word from a few pictures, everything else frozen (arXiv 2208.01618).

    (1)  rows = argmin E |eps - eps_hat(x_t, t, c(text; rows))|^2        (equation 2; v for models that predict v)
    (2)  x_0 = scaling_factor (mean + std z),  z drawn anew each step    (mean and std of each picture known beforehand)

The rows, and in Custom Diffusion some matrices of the UNet, are the only parameters that the optimiser knows. Inside
the step the rows stand below the frozen table, so the gradient of (1) passes through the text encoder, and nothing else
can move.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from jaxdiff.diffusion.loss import Weighting, diffusion_loss, q_sample
from jaxdiff.errors import InputError
from jaxdiff.io.adapters import of_all, of_words
from jaxdiff.io.concept_pictures import Concept
from jaxdiff.io.images import to_float
from jaxdiff.io.learned_embeddings import Learned
from jaxdiff.io.tokenizer import CLIPTokenizer
from jaxdiff.mesh import replicated, round_up
from jaxdiff.models.autoencoder import LatentNormal
from jaxdiff.recipes.custom_diffusion import Trained, split_trained, with_deltas
from jaxdiff.recipes.learned_words import TABLE, get_leaf, set_leaf, spell_out
from jaxdiff.recipes.sampling import in_batches
from jaxdiff.recipes.stable_diffusion import Params, StableDiffusion, encode_texts
from jaxdiff.recipes.training import LossFn
from jaxdiff.recipes.value_adapters import with_values
from jaxdiff.shapes import ImageKeys

Rows = Mapping[str, Float[Array, "n D"]]
"""By word, the vectors that are learned, float32."""
PICTURES_AT_ONCE = 4


class InversionBatch(NamedTuple):
    """Texts that hold the new words, each with what its picture's latents may be; NumPy or JAX arrays.

    Attributes:
      input_ids: tokens, (B, L).
      mean: of the latents, (B, h, w, c).
      log_variance: of the latents, (B, h, w, c).
      weight: of each picture in the mean loss, (B,); None means 1.
      mask: how much each latent pixel counts, (B, h, w); None means all the same.
    """

    input_ids: Any
    mean: Any
    log_variance: Any
    weight: Any = None
    mask: Any = None


def initial_rows(
    params: Params,
    tokenizer: CLIPTokenizer,
    concepts: Sequence[Concept],
    learned: Learned,
    vectors: int,
    mean: bool,
) -> Learned:
    """Return the rows that learning starts from: `vectors` times the embedding of each concept's initialiser.

    Args:
      params: of the model.
      tokenizer: of the model.
      concepts: words to learn.
      learned: words that the tokenizer knows from files, whose vectors an initialiser may be.
      vectors: rows of each word.
      mean: of an initialiser of several tokens, take the mean.

    Raises:
      InputError: an initialiser is several tokens, and not to be averaged; or none is, though they are to be.
    """
    table = np.asarray(get_leaf(params, TABLE), np.float32)
    rows, averaged = {}, False
    for concept in concepts:
        ids = tokenizer([spell_out(concept.initializer, learned)]).input_ids[0][1:-1]
        if len(ids) > 1 and not mean:
            pieces = " + ".join(repr(tokenizer.name_of(int(number))) for number in ids)
            raise InputError(
                f"--concept {concept.word}: the initialiser {concept.initializer!r} is several tokens, {pieces}: "
                "choose a word of one token, or start from their mean by --mean-initializer"
            )
        averaged |= len(ids) > 1
        rows[concept.word] = np.repeat(table[ids].mean(axis=0, keepdims=True), vectors, axis=0)
    if mean and not averaged:
        raise InputError("--mean-initializer has no effect: every initialiser is one token; drop it")
    return rows


def with_rows(params: Params, rows: Rows) -> Params:
    """Return the parameters with the rows below the frozen table."""
    table = get_leaf(params, TABLE)
    return set_leaf(params, TABLE, jnp.concatenate([table, *(row.astype(table.dtype) for row in rows.values())]))


def with_trained(params: Params, trained: Trained, words: Sequence[str]) -> Params:
    """Return the parameters with all that is learned: the rows of the words, and what is added to matrices.

    Where words have values of their own, it is for a model from `give_values`.
    """
    rows, deltas = split_trained(trained, words)
    params = with_rows(with_deltas(params, of_all(deltas)), rows)
    own = of_words(deltas)
    return with_values(params, own, words) if own else params


def make_inversion_loss(
    model: StableDiffusion,
    words: Sequence[str],
    weighting: Weighting = "constant",
    gamma: float = 5.0,
    timesteps: tuple[Any, Any] | None = None,
) -> LossFn:
    """Return equation (1) as `(what is learned, batch, keys, frozen parameters) -> mean loss`.

    Args:
      model: from `add_words`, whose text encoder has room for the rows.
      words: in the order in which they were added.
      weighting: of noise levels.
      gamma: clamp of min-SNR weighting.
      timesteps: the first and the one after the last that are drawn; None means all.
    """
    loss_fn = make_latent_loss(model, weighting, gamma, timesteps)

    def loss_of_trained(trained: Trained, batch: InversionBatch, keys: ImageKeys, frozen: Params) -> jax.Array:
        return loss_fn(with_trained(frozen, trained, words), batch, keys)

    return loss_of_trained


def make_latent_loss(
    model: StableDiffusion,
    weighting: Weighting = "constant",
    gamma: float = 5.0,
    timesteps: tuple[Any, Any] | None = None,
) -> LossFn:
    """Return the loss of latent diffusion (arXiv 2112.10752, equation 3): `(parameters, batch, keys) -> mean loss`.

    Args are those of `make_inversion_loss`.
    """
    schedule = model.diffusion.make_schedule()
    first, end = timesteps or (0, schedule.num_train_timesteps)
    scale = model.autoencoder.config.scaling_factor

    def loss_fn(params: Params, batch: InversionBatch, keys: ImageKeys) -> jax.Array:
        key_z, key_t, key_eps = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)

        def normals(keys: ImageKeys) -> Array:
            return jax.vmap(lambda key: jax.random.normal(key, batch.mean.shape[1:]))(keys)

        x_0 = scale * (batch.mean + jnp.exp(0.5 * batch.log_variance) * normals(key_z))
        t = jax.vmap(lambda key: jax.random.randint(key, (), first, end))(key_t)
        eps = normals(key_eps)
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        context = encode_texts(model, params, batch.input_ids)
        output: Any = model.unet.apply({"params": params["unet"]}, q_sample(x_0, eps, alpha_t, sigma_t), t, context)
        losses = diffusion_loss(
            output,
            x_0,
            eps,
            alpha_t,
            sigma_t,
            schedule.logsnr(t),
            model.diffusion.prediction_type,
            weighting,
            gamma,
            schedule.logsnr_slope(t),
            batch.mask,
        )
        return jnp.mean(losses if batch.weight is None else batch.weight * losses)

    return loss_fn


def encode_pictures(
    model: StableDiffusion,
    params: Params,
    pixels: UInt8[np.ndarray, "N H W 3"],
    mesh: Mesh,
    at_once: int = PICTURES_AT_ONCE,
) -> LatentNormal:
    """Return mean and log variance of the latents of each picture, in float32, as NumPy arrays."""

    def encode(params: Any, part: UInt8[Array, "B H W 3"]) -> LatentNormal:
        return model.autoencoder.apply({"params": params}, to_float(part), method="encode")  # type: ignore[return-value]

    compiled = jax.jit(encode, out_shardings=replicated(mesh))
    batch = round_up(min(at_once, len(pixels)), mesh)
    parts = [
        jax.tree.map(lambda leaf, count=count: np.asarray(leaf)[:count], compiled(params["vae"], part))
        for part, count in in_batches(pixels, batch, mesh)
    ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
