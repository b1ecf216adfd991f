"""Euler and Heun steps of the probability flow, with EDM's churn (arXiv 2206.00364, algorithms 1 and 2).

    (1)  l_t = sigma_t / alpha_t,   d(x_t / alpha_t) / d l_t = eps(x_t, t)
    (2)  Euler  x_s = alpha_s (x_t / alpha_t + (l_s - l_t) eps(x_t, t)) = alpha_s x_0 + sigma_s eps
    (3)  Heun   x_s of (2), then once more with the mean of eps(x_t, t) and eps(x_s, s)
    (4)  churn  before a step, noise raises l_t to l_t (1 + gamma), gamma = min(S_churn / N, sqrt(2) - 1)

Without churn, (2) is DDIM with eta = 0.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from jaxdiff.diffusion.prediction import Prediction, with_eps
from jaxdiff.diffusion.samplers import Draw, Move, Sampler, plan_moves, recombine
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.diffusion.timesteps import Walk
from jaxdiff.shapes import Images, Timestep


@dataclass(frozen=True)
class Churn:
    """Equation (4): how much fresh noise the steps add and take away again.

    Attributes:
      amount: S_churn, over all steps together; 0 for none.
      low: S_tmin, the least noise level that is raised.
      high: S_tmax, the greatest.
      noise: S_noise, standard deviation of the fresh noise.
    """

    amount: float = 0.0
    low: float = 0.0
    high: float = math.inf
    noise: float = 1.0

    def apply(self, schedule: NoiseSchedule, x_t: Images, move: Move, draw: Draw) -> tuple[Images, Timestep]:
        """Return x and t after equation (4); the level never leaves the schedule."""
        if self.amount == 0:
            return x_t, move.t
        level = schedule.noise_level(move.t)
        # Where nothing of the image is left, there is no level to raise.
        applies = (self.low <= level) & (level <= self.high) & jnp.isfinite(level)
        level = jnp.where(applies, level, 1.0)
        t = schedule.timestep_at(level * (1 + jnp.minimum(self.amount / move.total, math.sqrt(2) - 1)))
        alpha_t, _ = schedule.alpha_sigma(move.t)
        alpha, sigma = schedule.alpha_sigma(t)
        added = jnp.sqrt(jnp.maximum((sigma / alpha) ** 2 - level**2, 0.0))
        raised = alpha * (x_t / jnp.where(applies, alpha_t, 1.0) + added * self.noise * draw())
        return jnp.where(applies, raised, x_t), jnp.where(applies, t, move.t)


@dataclass(frozen=True)
class Euler(Sampler):
    """Equation (2) after churn."""

    churn: Churn = field(default_factory=Churn)

    def step(self, schedule, denoise, x_t, memory, move, draw):
        """Raise the noise level, then follow equation (2)."""
        x_t, t = self.churn.apply(schedule, x_t, move, draw)
        prediction = denoise(x_t, t)
        return recombine(schedule, prediction, move.s), memory, prediction


@dataclass(frozen=True)
class Heun(Sampler):
    """Equation (3) after churn: two evaluations a step, one for the step to clean data."""

    churn: Churn = field(default_factory=Churn)

    def plan(self, timesteps: Walk) -> Move:
        """Look at every interval from both of its ends."""
        return plan_moves(timesteps, corrected=len(timesteps) - 1)

    def start(self, x_T: Images):
        """Remember the prediction at the beginning of an interval, and alpha and sigma there."""
        return Prediction(x_T, x_T), jnp.ones(()), jnp.zeros(())

    def step(self, schedule, denoise, x_t, memory, move, draw):
        """Try, or correct the last try."""
        churned, raised_t = self.churn.apply(schedule, x_t, move, draw)
        x_t, t = jnp.where(move.again, x_t, churned), jnp.where(move.again, move.s, raised_t)
        prediction = denoise(x_t, t)
        # At the first look, what begins is what is seen: the mean below changes nothing then.
        begun = jax.tree.map(partial(jnp.where, move.again), memory, (prediction, *schedule.alpha_sigma(t)))
        corrected = with_eps(begun[0], (begun[0].eps + prediction.eps) / 2, *begun[1:])
        return recombine(schedule, corrected, move.s), begun, prediction
