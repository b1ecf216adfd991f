from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import SAMPLER_ATOL
from diffusers import DDIMScheduler, DDPMScheduler

from jaxdiff.diffusion.prediction import Prediction, to_prediction
from jaxdiff.diffusion.samplers import (
    ddim_step,
    ddpm_step,
    image_keys,
    posterior_std,
    sample,
    starting_noise,
)
from jaxdiff.diffusion.schedule import make_schedule, timestep_spacing, with_final

SHAPE = (4, 4, 3)
MEAN, STD = 0.3, 0.5


def keys_of(number, seed=0):
    return image_keys(jax.random.key(seed), jnp.arange(number))


def gaussian_denoiser(schedule):
    """Return the exact denoiser of data ~ N(MEAN, STD^2): the posterior mean of x_0."""

    def denoise(x_t, t):
        alpha, sigma = schedule.alpha_sigma(t)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        x_0 = MEAN + gain * (x_t - alpha * MEAN)
        return Prediction(x_0, (x_t - alpha * x_0) / sigma)

    return denoise


def exact_flow(schedule, x_T, t):
    """Return where the probability flow ODE ends: it keeps the quantile of a Gaussian."""
    a = float(schedule.alphas_cumprod[t])
    spread = np.sqrt(a * STD**2 + 1 - a)
    return MEAN + STD * (np.asarray(x_T, np.float64) - np.sqrt(a) * MEAN) / spread


def test_ddim_converges_with_order_one():
    schedule = make_schedule("linear")
    keys = keys_of(8)
    x_T = starting_noise(keys, SHAPE)
    steps, errors = np.array([10, 20, 40, 80]), []
    for num_steps in steps:
        timesteps = with_final(timestep_spacing("trailing", int(num_steps), 1000))
        x_0 = sample(gaussian_denoiser(schedule), x_T, keys, schedule, timesteps, ddim_step)
        errors.append(np.sqrt(np.mean((x_0 - exact_flow(schedule, x_T, 999)) ** 2)))
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope + 1) < 0.2, (slope, errors)


@pytest.mark.parametrize(("step", "eta"), [(ddim_step, 0.5), (ddim_step, 1.0), (ddpm_step, 1.0)])
def test_stochastic_samplers_keep_mean_and_variance(step, eta):
    schedule = make_schedule("linear")
    keys = keys_of(400)
    step = partial(step, eta=eta) if step is ddim_step else step
    timesteps = with_final(timestep_spacing("trailing", 250, 1000))
    x_0 = np.asarray(sample(gaussian_denoiser(schedule), starting_noise(keys, SHAPE), keys, schedule, timesteps, step))
    # 19,200 independent values: standard errors 0.5/139 = 0.0036 (mean) and 0.0026 (std); four of them, and the
    # discretisation error of 250 steps, which shrinks the spread by about 1 %.
    assert abs(x_0.mean() - MEAN) < 0.0144
    assert abs(x_0.std() - STD) < 0.0104 + 0.01 * STD


def test_direction_without_noise_would_be_caught():
    # The fault of three JAX code bases: the direction is shortened for eta > 0 but no noise is added.
    schedule = make_schedule("linear")
    keys = keys_of(400)

    def faulty(schedule, prediction, x_t, t, s, draw):
        return ddim_step(schedule, prediction, x_t, t, s, lambda: jnp.zeros_like(x_t), eta=1.0)

    timesteps = with_final(timestep_spacing("trailing", 250, 1000))
    x_0 = sample(gaussian_denoiser(schedule), starting_noise(keys, SHAPE), keys, schedule, timesteps, faulty)
    assert np.asarray(x_0).std() < 0.7 * STD


def test_ddim_with_eta_one_is_the_ddpm_posterior():
    schedule = make_schedule("linear", 50)
    keys = keys_of(3)
    x_T = starting_noise(keys, SHAPE)
    timesteps = with_final(np.arange(49, -1, -1, dtype=np.int32))
    run = partial(sample, gaussian_denoiser(schedule), x_T, keys, schedule, timesteps)
    np.testing.assert_allclose(run(partial(ddim_step, eta=1.0)), run(ddpm_step), atol=SAMPLER_ATOL)


def toy_network(x_t, t, xp):
    """A fixed nonlinear stand-in for a trained network."""
    return xp.tanh(0.7 * x_t + 0.1) * 0.9 + 0.0002 * t


@pytest.mark.parametrize("prediction_type", ["eps", "x_0", "v"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("num_steps", [10, 50])
def test_ddim_as_in_diffusers(prediction_type, spacing, num_steps):
    schedule = make_schedule("scaled_linear", beta_start=0.00085, beta_end=0.012)
    keys = keys_of(2)
    x_T = starting_noise(keys, SHAPE)

    def denoise(x_t, t):
        alpha, sigma = schedule.alpha_sigma(t)
        return to_prediction(toy_network(x_t, t, jnp), x_t, alpha, sigma, prediction_type)

    timesteps = with_final(timestep_spacing(spacing, num_steps, 1000))
    ours = sample(denoise, x_T, keys, schedule, timesteps, ddim_step)
    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type={"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}[prediction_type],
        timestep_spacing=spacing,
        clip_sample=False,
        set_alpha_to_one=True,
    )
    theirs.set_timesteps(num_steps)
    x = torch.from_numpy(np.array(x_T))
    for t in theirs.timesteps:
        x = theirs.step(toy_network(x, float(t), torch), t, x).prev_sample
    np.testing.assert_allclose(ours, x.numpy(), atol=SAMPLER_ATOL, rtol=SAMPLER_ATOL)


@pytest.mark.parametrize("eta", [0.25, 1.0])
def test_eta_as_in_diffusers_with_the_same_noise(eta):
    schedule = make_schedule("linear")
    keys = keys_of(2)
    x_T = starting_noise(keys, SHAPE)
    timesteps = with_final(timestep_spacing("leading", 20, 1000))
    drawn = []

    def denoise(x_t, t):
        alpha, sigma = schedule.alpha_sigma(t)
        return to_prediction(toy_network(x_t, t, jnp), x_t, alpha, sigma, "eps")

    def recording_step(schedule, prediction, x_t, t, s, draw):
        noise = draw()
        jax.debug.callback(lambda n: drawn.append(np.array(n)), noise, ordered=True)
        return ddim_step(schedule, prediction, x_t, t, s, lambda: noise, eta=eta)

    ours = sample(denoise, x_T, keys, schedule, timesteps, recording_step)
    jax.effects_barrier()
    theirs = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=True)
    theirs.set_timesteps(20)
    x = torch.from_numpy(np.array(x_T))
    for t, noise in zip(theirs.timesteps, drawn, strict=True):
        output = toy_network(x, float(t), torch)
        x = theirs.step(output, t, x, eta=eta, variance_noise=torch.from_numpy(noise)).prev_sample
    np.testing.assert_allclose(ours, x.numpy(), atol=10 * SAMPLER_ATOL, rtol=10 * SAMPLER_ATOL)
    assert np.std(drawn) == pytest.approx(1.0, abs=0.1)


def test_strided_posterior_std_as_in_diffusers():
    schedule = make_schedule("linear")
    theirs = DDPMScheduler(beta_start=1e-4, beta_end=0.02, variance_type="fixed_small")
    theirs.set_timesteps(100)
    for t in (990, 500, 20, 10):
        variance = theirs._get_variance(torch.tensor(t)).item()
        ours = posterior_std(schedule, jnp.int32(t), jnp.int32(t - 10))
        np.testing.assert_allclose(float(ours) ** 2, variance, rtol=5e-3)
    assert float(posterior_std(schedule, jnp.int32(0), jnp.int32(-1))) == 0.0


def test_a_batch_of_n_equals_n_singles():
    schedule = make_schedule("linear")
    timesteps = with_final(timestep_spacing("leading", 10, 1000))
    step = partial(ddim_step, eta=1.0)

    def run(keys):
        x_T = starting_noise(keys, SHAPE)
        return sample(gaussian_denoiser(schedule), x_T, keys, schedule, timesteps, step)

    together = run(keys_of(5))
    for i in (0, 3, 4):
        alone = run(image_keys(jax.random.key(0), jnp.array([i])))
        np.testing.assert_allclose(alone[0], together[i], atol=SAMPLER_ATOL)


def test_trajectory_holds_every_state_and_changes_nothing():
    schedule = make_schedule("linear")
    keys = keys_of(2)
    x_T = starting_noise(keys, SHAPE)
    timesteps = with_final(timestep_spacing("leading", 6, 1000))
    run = partial(sample, gaussian_denoiser(schedule), x_T, keys, schedule, timesteps, ddim_step)
    x_0, trajectory = run(trajectory=True)
    np.testing.assert_array_equal(x_0, run())
    np.testing.assert_array_equal(trajectory.x_t[0], x_T)
    np.testing.assert_array_equal(trajectory.x_t[-1], x_0)
    assert trajectory.x_t.shape[0] == 7
    np.testing.assert_allclose(trajectory.x_0[-1], x_0, atol=SAMPLER_ATOL)


def test_compiled_program_does_not_grow_with_steps():
    schedule = make_schedule("linear")
    keys = keys_of(1)

    def size(num_steps):
        timesteps = with_final(timestep_spacing("leading", num_steps, 1000))

        def run(x_T):
            return sample(gaussian_denoiser(schedule), x_T, keys, schedule, timesteps, ddim_step)

        return str(jax.make_jaxpr(run)(starting_noise(keys, SHAPE))).count("\n")

    assert size(500) == size(5)
