import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import SAMPLER_ATOL
from diffusers import DDIMInverseScheduler
from test_diffusion_multistep import KEYS, SCALES, SCHEDULE, X_T, spaced, toy_network

from jaxdiff.diffusion.inversion import invert
from jaxdiff.diffusion.prediction import to_prediction
from jaxdiff.diffusion.samplers import DDIM, sample


def denoise(x_t, t):
    return to_prediction(toy_network(x_t, t, jnp), x_t, *SCHEDULE.alpha_sigma(t), "eps")


def test_one_iteration_as_in_diffusers():
    scheduler = DDIMInverseScheduler(**SCALES, clip_sample=False, timestep_spacing="leading", set_alpha_to_one=True)
    scheduler.set_timesteps(20)
    x = torch.from_numpy(np.array(0.5 * X_T))
    for t in scheduler.timesteps:
        x = scheduler.step(toy_network(x, float(t), torch), t, x).prev_sample
    found = invert(denoise, 0.5 * X_T, SCHEDULE, spaced("leading", 20))
    np.testing.assert_allclose(found, x.numpy(), atol=SAMPLER_ATOL, rtol=SAMPLER_ATOL)


def round_trip(num_steps, iterations):
    timesteps = spaced("trailing", num_steps)
    x_0 = sample(denoise, X_T, KEYS, SCHEDULE, timesteps, DDIM())
    x_T = invert(denoise, x_0, SCHEDULE, timesteps, iterations)
    again = sample(denoise, x_T, KEYS, SCHEDULE, timesteps, DDIM())
    return float(jnp.abs(again - x_0).max())


def test_round_trip_comes_back_with_more_steps_or_more_iterations():
    once = round_trip(20, 1)
    assert round_trip(160, 1) < once / 4
    assert round_trip(20, 4) < once / 10


def test_many_iterations_find_the_very_noise():
    timesteps = spaced("trailing", 20)
    x_0 = sample(denoise, X_T, KEYS, SCHEDULE, timesteps, DDIM())
    # Dividing by alpha_999 = 0.07 magnifies the rounding of x_0.
    np.testing.assert_allclose(invert(denoise, x_0, SCHEDULE, timesteps, 40), X_T, atol=100 * SAMPLER_ATOL)


@pytest.mark.parametrize("iterations", [1, 5])
def test_program_does_not_grow_with_iterations_or_steps(iterations):
    def lines(num_steps):
        program = jax.jit(lambda x_0: invert(denoise, x_0, SCHEDULE, spaced("trailing", num_steps), iterations))
        return program.lower(X_T).as_text().count("\n")

    assert lines(100) == lines(4)
