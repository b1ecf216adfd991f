"""What a network predicts, and the pair (x_0, eps) that everything else works with.

(1)  x_t = alpha_t x_0 + sigma_t eps
(2)  v   = alpha_t eps - sigma_t x_0                                   (arXiv 2202.00512, appendix D)
(3)  x_0 = alpha_t x_t - sigma_t v,   eps = sigma_t x_t + alpha_t v    (from 1 and 2, alpha^2 + sigma^2 = 1)
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.shapes import Images

PredictionType = Literal["eps", "x_0", "v"]
Scale = Float[Array, ""] | Float[Array, "B"]
"""alpha_t or sigma_t: one for the batch, or one for each image."""


HIGHEST_LEVEL = 80.0
"""sigma_t / alpha_t beyond which x_0 cannot be had from an eps of elsewhere, whose error it multiplies: the highest
level that EDM samples from (arXiv 2206.00364, table 1). Cosine schedules begin far above it."""


class Prediction(NamedTuple):
    """The clean image and the noise that a network sees in x_t; they satisfy equation (1)."""

    x_0: Images
    eps: Images


def expand(scale: Scale, images: Images) -> Array:
    """Give a scale the rank of the images, so that the two multiply."""
    return jnp.reshape(scale, (-1,) + (1,) * (images.ndim - 1))


def to_prediction(
    output: Images, x_t: Images, alpha_t: Scale, sigma_t: Scale, prediction_type: PredictionType
) -> Prediction:
    """Turn a network's output into the pair, by equations (1) and (3).

    eps needs alpha_t > 0 (see `check_prediction_type`); where sigma_t = 0, x_0 prediction gives eps = 0.

    Raises:
      ValueError: unknown prediction type.
    """
    alpha, sigma = expand(alpha_t, x_t), expand(sigma_t, x_t)
    if prediction_type == "eps":
        return Prediction((x_t - sigma * output) / alpha, output)
    if prediction_type == "x_0":
        return Prediction(output, _noise_of(output, x_t, alpha, sigma))
    if prediction_type == "v":
        return Prediction(alpha * x_t - sigma * output, sigma * x_t + alpha * output)
    raise ValueError(f"unknown prediction type {prediction_type!r}: choose eps, x_0 or v")


def to_target(x_0: Images, eps: Images, alpha_t: Scale, sigma_t: Scale, prediction_type: PredictionType) -> Images:
    """Return what the network should output: eps, x_0, or v of equation (2)."""
    if prediction_type == "eps":
        return eps
    if prediction_type == "x_0":
        return x_0
    if prediction_type == "v":
        return expand(alpha_t, x_0) * eps - expand(sigma_t, x_0) * x_0
    raise ValueError(f"unknown prediction type {prediction_type!r}: choose eps, x_0 or v")


def clip_x_0(prediction: Prediction, x_t: Images, alpha_t: Scale, sigma_t: Scale, bound: float = 1.0) -> Prediction:
    """Clip the clean image to [-bound, bound] and recompute the noise, so that equation (1) still holds."""
    x_0 = jnp.clip(prediction.x_0, -bound, bound)
    return Prediction(x_0, _noise_of(x_0, x_t, expand(alpha_t, x_t), expand(sigma_t, x_t)))


def threshold_x_0(
    prediction: Prediction, x_t: Images, alpha_t: Scale, sigma_t: Scale, quantile: float = 0.995
) -> Prediction:
    """Scale the clean image down to [-1, 1] where more than a few values exceed it, "dynamic thresholding".

    Each image is clipped to its own `quantile` of |x_0|, at least 1, and divided by it (arXiv 2205.11487, section 2.3);
    the noise is recomputed, so that equation (1) still holds.
    """
    magnitudes = jnp.abs(prediction.x_0).reshape(x_t.shape[0], -1)
    bound = expand(jnp.maximum(jnp.quantile(magnitudes, quantile, axis=1), 1.0), x_t)
    x_0 = jnp.clip(prediction.x_0, -bound, bound) / bound
    return Prediction(x_0, _noise_of(x_0, x_t, expand(alpha_t, x_t), expand(sigma_t, x_t)))


def with_eps(prediction: Prediction, eps: Images, alpha_t: Scale, sigma_t: Scale) -> Prediction:
    """Put another noise in and solve equation (1) for x_0; nothing changes at noise levels above `HIGHEST_LEVEL`."""
    alpha, sigma = expand(alpha_t, eps), expand(sigma_t, eps)
    applies = sigma <= HIGHEST_LEVEL * alpha
    solved = prediction.x_0 - sigma / jnp.where(applies, alpha, 1.0) * (eps - prediction.eps)
    return Prediction(jnp.where(applies, solved, prediction.x_0), jnp.where(applies, eps, prediction.eps))


def _noise_of(x_0: Images, x_t: Images, alpha: Array, sigma: Array) -> Images:
    """Solve equation (1) for eps; 0 where there is no noise."""
    return jnp.where(sigma > 0, (x_t - alpha * x_0) / jnp.where(sigma > 0, sigma, 1.0), 0.0)
