"""Samplers that remember what they saw in earlier steps: DPM-Solver++ 2M and its SDE form, UniPC, PNDM.

    (1)  lambda_t = log(alpha_t / sigma_t),   h = lambda_s - lambda_t,   r = h_before / h
    (2)  2M      x_s = sigma_s/sigma_t x_t + alpha_s (1 - e^-h) D,   D = x_0(t) + (x_0(t) - x_0(before)) / (2 r)
                                                                             (arXiv 2211.01095, algorithm 2)
    (3)  2M SDE  x_s = sigma_s/sigma_t e^-h x_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) z
                                                                             (arXiv 2211.01095, section 5)
    (4)  UniPC   predictor and corrector of order 2 in x_0, B(h) = e^-h - 1  (arXiv 2302.04867, algorithms 1 and 2)
    (5)  PNDM    x_s = alpha_s x_0' + sigma_s eps', eps' the Adams-Bashforth mean of the last four eps
                                                                             (arXiv 2202.09778, eq. 11 and 12)

The first step has no past, and the step to clean data has h = inf: (2) to (4) take both with D = x_0(t), and without
noise that is DDIM.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.diffusion.prediction import Prediction, with_eps
from jaxdiff.diffusion.samplers import Move, Sampler, plan_moves, recombine
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.diffusion.timesteps import Walk
from jaxdiff.shapes import Images, Scalar, Timestep


@dataclass(frozen=True)
class DPMSolverMultistep(Sampler):
    """DPM-Solver++ 2M.

    Attributes:
      stochastic: equation (3) instead of (2).
    """

    stochastic: bool = False

    def start(self, x_T: Images):
        """Remember the last clean image and its lambda."""
        return jnp.zeros_like(x_T), jnp.zeros(())

    def step(self, schedule, denoise, x_t, memory, move, draw):
        """Take equation (2) or (3)."""
        prediction = denoise(x_t, move.t)
        x_0 = _extrapolate(schedule, move, prediction.x_0, *memory)
        memory = prediction.x_0, half_logsnr(schedule, move.t)
        if not self.stochastic:
            return _exponential_step(schedule, x_t, x_0, move), memory, prediction
        _, sigma_t = schedule.alpha_sigma(move.t)
        alpha_s, sigma_s = schedule.alpha_sigma(move.s)
        h = half_logsnr(schedule, move.s) - half_logsnr(schedule, move.t)
        fresh = -jnp.expm1(-2 * h)
        mean = sigma_s / sigma_t * jnp.exp(-h) * x_t + alpha_s * fresh * x_0
        return mean + sigma_s * jnp.sqrt(fresh) * draw(), memory, prediction


def half_logsnr(schedule: NoiseSchedule, t: Timestep) -> Scalar:
    """Return lambda_t of equation (1)."""
    return 0.5 * schedule.logsnr(t)


def _extrapolate(schedule: NoiseSchedule, move: Move, x_0: Images, before: Images, lambda_before: Scalar) -> Images:
    """Return D of equation (2); x_0 itself in the first step and in the step to clean data."""
    lambda_t, lambda_s = half_logsnr(schedule, move.t), half_logsnr(schedule, move.s)
    applies = (move.number > 1) & (move.s >= 0)
    inverse_r = jnp.where(applies, lambda_s - lambda_t, 0.0) / jnp.where(applies, lambda_t - lambda_before, 1.0)
    return x_0 + 0.5 * inverse_r * (x_0 - before)


def _exponential_step(schedule: NoiseSchedule, x_t: Images, x_0: Images, move: Move) -> Images:
    """Return x_s of equation (2) for D = x_0."""
    _, sigma_t = schedule.alpha_sigma(move.t)
    alpha_s, sigma_s = schedule.alpha_sigma(move.s)
    h = half_logsnr(schedule, move.s) - half_logsnr(schedule, move.t)
    return sigma_s / sigma_t * x_t - alpha_s * jnp.expm1(-h) * x_0


class _Past(NamedTuple):
    """What UniPC remembers: the state where the last step began, the clean images seen there and one step earlier."""

    x: Images
    x_0: Images
    x_0_before: Images
    sigma: Scalar
    half_logsnr: Scalar
    half_logsnr_before: Scalar


@dataclass(frozen=True)
class UniPC(Sampler):
    """Equation (4): each evaluation corrects the step that led to it; the predictor is equation (2)."""

    def start(self, x_T: Images):
        """Remember the last two steps."""
        image, number = jnp.zeros_like(x_T), jnp.ones(())
        return _Past(image, image, image, number, number, number)

    def step(self, schedule, denoise, x_t, memory, move, draw):
        """Correct x_t, then predict x_s."""
        prediction = denoise(x_t, move.t)
        corrected = _correct(schedule, prediction.x_0, memory, move)
        x_t = jnp.where(move.number > 1, corrected, x_t)
        x_0 = _extrapolate(schedule, move, prediction.x_0, memory.x_0, memory.half_logsnr)
        _, sigma_t = schedule.alpha_sigma(move.t)
        lambda_t = half_logsnr(schedule, move.t)
        past = _Past(x_t, prediction.x_0, memory.x_0, sigma_t, lambda_t, memory.half_logsnr)
        return _exponential_step(schedule, x_t, x_0, move), past, prediction


def _correct(schedule: NoiseSchedule, x_0: Images, past: _Past, move: Move) -> Images:
    """Return x_t again, now that the clean image at t is known: UniC of order 1 in the second step, then of order 2."""
    alpha_t, sigma_t = schedule.alpha_sigma(move.t)
    h = jnp.where(move.number > 1, half_logsnr(schedule, move.t) - past.half_logsnr, 1.0)
    r = jnp.where(move.number > 2, (past.half_logsnr_before - past.half_logsnr) / h, -1.0)
    first, second = _unipc_moments(-h)
    older = jnp.where(move.number > 2, (first - second) / (1 - r), 0.0)
    newest = jnp.where(move.number > 2, first - older, 0.5)
    change = older / r * (past.x_0_before - past.x_0) + newest * (x_0 - past.x_0)
    return sigma_t / past.sigma * past.x - alpha_t * jnp.expm1(-h) * (past.x_0 + change)


def _unipc_moments(z: Scalar) -> tuple[Scalar, Scalar]:
    """Return phi_2(z) / phi_1(z) and 2 phi_3(z) / phi_1(z), phi_k+1(z) = (phi_k(z) - 1/k!) / z, phi_1 = (e^z - 1) / z.

    Near 0 by their series, because the differences lose all digits there in float32.
    """
    small = jnp.abs(z) < 0.5
    far, near = jnp.where(small, -1.0, z), jnp.where(small, z, 0.0)
    whole = jnp.expm1(far)
    far_first = (whole / far - 1) / whole
    far_second = 2 * (far_first / far - 0.5 / whole)
    series = [sum(near**n / math.factorial(n + k) for n in range(9)) for k in (1, 2, 3)]
    return (
        jnp.where(small, series[1] / series[0], far_first),
        jnp.where(small, 2 * series[2] / series[0], far_second),
    )


ADAMS_BASHFORTH = ((1.0, 0.0, 0.0, 0.0), (3 / 2, -1 / 2, 0.0, 0.0), (23 / 12, -16 / 12, 5 / 12, 0.0),
                   (55 / 24, -59 / 24, 37 / 24, -9 / 24))  # fmt: skip
"""Weights of the newest to the oldest eps, with 1 to 4 of them known."""


@dataclass(frozen=True)
class PNDM(Sampler):
    """Equation (5) without Runge-Kutta warm-up ("PLMS"): the first interval is looked at twice, as by Heun's method.

    The weights are those of steps of equal length in t.
    """

    def plan(self, timesteps: Walk) -> Move:
        """Look at the first interval from both of its ends."""
        return plan_moves(timesteps, corrected=1)

    def start(self, x_T: Images):
        """Remember four eps, the newest first, and the prediction, alpha and sigma where the last step began."""
        return jnp.stack([jnp.zeros_like(x_T)] * 4), (Prediction(x_T, x_T), jnp.ones(()), jnp.zeros(()))

    def step(self, schedule, denoise, x_t, memory, move, draw):
        """Follow the mean of the last eps; or, at the second look, that of both ends of the first interval."""
        known, begun = memory
        prediction = denoise(x_t, move.seen_at)
        known = jnp.where(move.again, known, jnp.concatenate([prediction.eps[None], known[:-1]]))
        now = prediction, *schedule.alpha_sigma(move.t)
        start, alpha_t, sigma_t = jax.tree.map(partial(jnp.where, move.again), begun, now)
        weights = jnp.asarray(ADAMS_BASHFORTH)[jnp.minimum(move.number, 4) - 1]
        of_both_ends = (known[0] + prediction.eps) / 2
        eps = jnp.where(move.again, of_both_ends, jnp.tensordot(weights, known, axes=1))
        x_s = recombine(schedule, with_eps(start, eps, alpha_t, sigma_t), move.s)
        return x_s, (known, (start, alpha_t, sigma_t)), prediction
