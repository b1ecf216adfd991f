"""Noise schedules: how much of the image is left at each timestep.

    (1)  x_t = alpha_t x_0 + sigma_t eps,   alpha_t = sqrt(alphas_cumprod[t]),  sigma_t = sqrt(1 - alphas_cumprod[t])
    (2)  linear         betas = linspace(beta_start, beta_end, T)                         (arXiv 2006.11239)
    (3)  scaled_linear  betas = linspace(sqrt(beta_start), sqrt(beta_end), T)^2           (arXiv 2112.10752)
    (4)  cosine         betas[t] = min(1 - f((t+1)/T) / f(t/T), 0.999),
                        f(u) = cos((u + 0.008) / 1.008 * pi/2)^2                          (arXiv 2102.09672, eq. 17)
    (5)  logsnr_t = 2 log(alpha_t / sigma_t),   noise_level_t = sigma_t / alpha_t,
         logsnr_slope_t = -d logsnr / d u,  u = t / T
    (6)  zero terminal SNR: sqrt(alphas_cumprod) shifted and scaled so that its last entry is 0 and its first
         stays                                                                            (arXiv 2305.08891, alg. 1)

Code index t is DDPM's step t+1. Tables are made in float64 and cast once. Between the integers, logsnr is linear in t.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

ScheduleName = Literal["linear", "scaled_linear", "cosine"]
Times = Int[Array, "*S"] | Float[Array, "*S"]
"""Timesteps; real numbers lie between the integers of the tables."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoiseSchedule:
    """Tables over the T training timesteps, float32."""

    betas: Float[Array, "T"]
    alphas_cumprod: Float[Array, "T"]
    sqrt_alphas_cumprod: Float[Array, "T"]
    sqrt_one_minus_alphas_cumprod: Float[Array, "T"]
    logsnrs: Float[Array, "T"]
    logsnr_slopes: Float[Array, "T"]

    @property
    def num_train_timesteps(self) -> int:
        """The number of timesteps, T."""
        return self.betas.shape[0]

    def alpha_sigma(self, t: Times) -> tuple[Float[Array, "*S"], Float[Array, "*S"]]:
        """Return (alpha_t, sigma_t) of equation (1); t = -1 means clean data, (1, 0)."""
        clean = t < 0
        if jnp.issubdtype(t.dtype, jnp.integer):
            index = jnp.maximum(t, 0)
            alpha, sigma = self.sqrt_alphas_cumprod[index], self.sqrt_one_minus_alphas_cumprod[index]
        else:
            logsnr = self.logsnr(t)
            alpha, sigma = jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))
        return jnp.where(clean, 1.0, alpha), jnp.where(clean, 0.0, sigma)

    def logsnr(self, t: Times) -> Float[Array, "*S"]:
        """Return equation (5): inf for clean data, -inf where nothing of the image is left."""
        if jnp.issubdtype(t.dtype, jnp.integer):
            inside = self.logsnrs[jnp.maximum(t, 0)]
        else:
            inside = jnp.interp(t, jnp.arange(self.num_train_timesteps, dtype=t.dtype), self.logsnrs)
        return jnp.where(t < 0, jnp.inf, inside)

    def logsnr_slope(self, t: Int[Array, "*S"]) -> Float[Array, "*S"]:
        """Return the slope of equation (5) by central differences: how much logsnr one timestep stands for, times T."""
        return self.logsnr_slopes[t]

    def noise_level(self, t: Times) -> Float[Array, "*S"]:
        """Return sigma_t / alpha_t, the noise level of EDM and k-diffusion (arXiv 2206.00364); 0 for clean data."""
        return jnp.exp(-0.5 * self.logsnr(t))

    def timestep_at(self, noise_level: Float[Array, "*S"]) -> Float[Array, "*S"]:
        """Return the timestep of a noise level, the inverse of `noise_level`; levels outside the table are moved in."""
        timesteps = jnp.arange(self.num_train_timesteps, dtype=self.logsnrs.dtype)
        return jnp.interp(jnp.log(noise_level), -0.5 * self.logsnrs, timesteps)


def make_schedule(
    name: ScheduleName,
    num_train_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    zero_terminal_snr: bool = False,
) -> NoiseSchedule:
    """Build the tables of equations (2) to (6).

    Args:
      name: which equation gives the betas.
      num_train_timesteps: T.
      beta_start: first beta, in (0, 1); the cosine schedule has none.
      beta_end: last beta, likewise.
      zero_terminal_snr: apply equation (6).

    Raises:
      ValueError: unknown name, or betas outside 0 < beta_start <= beta_end < 1.
    """
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"betas need 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
    if name == "linear":
        betas = np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64)
    elif name == "scaled_linear":
        betas = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=np.float64) ** 2
    elif name == "cosine":
        u = np.arange(num_train_timesteps + 1, dtype=np.float64) / num_train_timesteps
        f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    else:
        raise ValueError(f"unknown schedule {name!r}: choose linear, scaled_linear or cosine")
    alphas_cumprod = np.cumprod(1 - betas)
    if zero_terminal_snr:
        root = np.sqrt(alphas_cumprod)
        alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        betas = 1 - alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]])
    with np.errstate(divide="ignore"):
        logsnrs = np.log(alphas_cumprod) - np.log1p(-alphas_cumprod)
    # Where nothing of the image is left, logsnr is -inf; the slope there is that of the last finite step.
    known = logsnrs[np.isfinite(logsnrs)]
    slopes = -num_train_timesteps * np.gradient(known) if len(known) > 1 else np.ones_like(known)
    slopes = np.pad(slopes, (0, num_train_timesteps - len(known)), mode="edge")
    tables = betas, alphas_cumprod, np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod), logsnrs, slopes
    return NoiseSchedule(*(jnp.asarray(table, jnp.float32) for table in tables))


def check_prediction_type(schedule: NoiseSchedule, prediction_type: str) -> None:
    """Raise ValueError for eps prediction where the last timestep holds no signal: there eps says nothing of x_0."""
    if prediction_type == "eps" and float(schedule.alphas_cumprod[-1]) == 0.0:
        raise ValueError("eps prediction is undefined at zero terminal SNR: predict v or x_0")
