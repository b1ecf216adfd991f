"""The diffusion loss and its weights over noise levels.

A weight is stated once for the error of one quantity and carried to the others by (x_t is given):

    (1)  |eps_hat - eps|^2 = snr |x_0_hat - x_0|^2 = alpha_t^2 |v_hat - v|^2,    snr = exp(logsnr)

    (2)  constant  1 on the error of whatever the network predicts               (arXiv 2006.11239, eq. 14)
    (3)  min_snr   min(snr, gamma) on the x_0 error                              (arXiv 2303.09556, eq. 8)
    (4)  sigmoid   sigmoid(bias - logsnr) on the eps error, the average taken over logsnr: for uniform
                   timesteps, times logsnr_slope                            (arXiv 2303.00848; 2410.19324)
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.diffusion.prediction import PredictionType, Scale, expand, to_target
from jaxdiff.shapes import Images

Weighting = Literal["constant", "min_snr", "sigmoid"]


def q_sample(x_0: Images, eps: Images, alpha_t: Scale, sigma_t: Scale) -> Images:
    """Return the noisy image alpha_t x_0 + sigma_t eps (arXiv 2006.11239, eq. 4)."""
    return expand(alpha_t, x_0) * x_0 + expand(sigma_t, x_0) * eps


def loss_weight(
    logsnr: Float[Array, "*S"],
    weighting: Weighting,
    prediction_type: PredictionType,
    gamma: float = 5.0,
    bias: float = 2.0,
    logsnr_slope: Float[Array, "*S"] | float = 1.0,
) -> Float[Array, "*S"]:
    """Return what the squared error of the network's own output is multiplied by.

    Finite for every logsnr, -inf included, wherever the mathematics is.

    Args:
      logsnr: log signal-to-noise power ratio.
      weighting: equation (2), (3) or (4).
      prediction_type: the output that the error is measured on.
      gamma: clamp of equation (3), a power ratio.
      bias: logsnr at which equation (4) is one half.
      logsnr_slope: of equation (4), where timesteps are drawn uniformly; 1 where logsnr is.

    Raises:
      ValueError: unknown weighting or prediction type.
    """
    if prediction_type not in ("eps", "x_0", "v"):
        raise ValueError(f"unknown prediction type {prediction_type!r}: choose eps, x_0 or v")
    if weighting == "constant":
        return jnp.ones_like(logsnr)
    snr = jnp.exp(logsnr)
    if weighting == "min_snr":
        on_x_0 = jnp.minimum(snr, gamma)
        if prediction_type == "eps":
            return jnp.minimum(1.0, gamma / snr)
        # The v error is the x_0 error / sigma_t^2, and sigma_t^2 = 1 / (snr + 1).
        return on_x_0 if prediction_type == "x_0" else on_x_0 / (snr + 1)
    if weighting == "sigmoid":
        on_eps = jax.nn.sigmoid(bias - logsnr)
        if prediction_type == "eps":
            return logsnr_slope * on_eps
        if prediction_type == "x_0":
            # snr * sigmoid(bias - logsnr) without the overflow of snr at large logsnr.
            return logsnr_slope * jnp.exp(bias) * jax.nn.sigmoid(logsnr - bias)
        return logsnr_slope * jax.nn.sigmoid(logsnr) * on_eps
    raise ValueError(f"unknown weighting {weighting!r}: choose constant, min_snr or sigmoid")


def diffusion_loss(
    output: Images,
    x_0: Images,
    eps: Images,
    alpha_t: Scale,
    sigma_t: Scale,
    logsnr: Scale,
    prediction_type: PredictionType,
    weighting: Weighting = "constant",
    gamma: float = 5.0,
    logsnr_slope: Scale | float = 1.0,
    mask: Float[Array, "B H W"] | None = None,
) -> Float[Array, "B"]:
    """Return each image's weighted mean squared error, in float32; a mask says how much each pixel counts in the mean.

    Where a mask is 0 everywhere, so is the error.
    """
    target = to_target(x_0, eps, alpha_t, sigma_t, prediction_type)
    error = jnp.mean(jnp.square(output - target), axis=-1)
    if mask is None:
        error = jnp.mean(error, axis=(1, 2))
    else:
        error = jnp.sum(mask * error, axis=(1, 2)) / jnp.maximum(jnp.sum(mask, axis=(1, 2)), 1e-6)
    return loss_weight(logsnr, weighting, prediction_type, gamma, logsnr_slope=logsnr_slope) * error
