"""Every sampler beside diffusers' scheduler of the same name: same network, same starting noise, same draws.

Known faults of diffusers that are not copied: DDIM with linspace spacing steps from t to t - T/N, not to the next t of
its list (huggingface/diffusers#12633); Euler and Heun add churn after the network has seen the state; karras spacing
of DPM-Solver and UniPC shows the network timesteps rounded to integers; PNDM averages v over timesteps instead of eps.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import SAMPLER_ATOL
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from jaxdiff.diffusion.edm import Euler, Heun
from jaxdiff.diffusion.multistep import PNDM, DPMSolverMultistep, UniPC
from jaxdiff.diffusion.prediction import threshold_x_0, to_prediction
from jaxdiff.diffusion.samplers import DDIM, DDPM, image_keys, sample, starting_noise
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.diffusion.timesteps import timestep_spacing, with_final

SCALES = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = make_schedule("scaled_linear", beta_start=0.00085, beta_end=0.012)
TYPES = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
KEYS = image_keys(jax.random.key(0), jnp.arange(2))
X_T = starting_noise(KEYS, (4, 4, 3))


def toy_network(x_t, t, xp):
    """A fixed nonlinear stand-in for a trained network."""
    return xp.tanh(0.7 * x_t + 0.1) * 0.9 + 0.0002 * t


def ours(sampler, timesteps, prediction_type="eps"):
    def denoise(x_t, t):
        return to_prediction(toy_network(x_t, t, jnp), x_t, *SCHEDULE.alpha_sigma(t), prediction_type)

    return np.asarray(sample(denoise, X_T, KEYS, SCHEDULE, timesteps, sampler))


def theirs(scheduler, num_steps, scaled=False, **options):
    scheduler.set_timesteps(num_steps)
    # Schedulers that divide x by alpha start from noise of their first level, signal included.
    x = torch.from_numpy(np.array(X_T)) * ((scheduler.sigmas[0] ** 2 + 1) ** 0.5 if scaled else 1)
    for number, t in enumerate(scheduler.timesteps):
        output = toy_network(scheduler.scale_model_input(x, t), float(t), torch)
        noise = {"variance_noise": draw(number + 1)} if options.get("noisy") else {}
        x = scheduler.step(output, t, x, **noise).prev_sample
    return x.numpy()


def draw(number):
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), X_T.shape[1:]))(KEYS)
    return torch.from_numpy(np.array(noise))


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=SAMPLER_ATOL, rtol=SAMPLER_ATOL)


def spaced(spacing, num_steps, **options):
    return with_final(timestep_spacing(spacing, num_steps, SCHEDULE, **options))


SPACINGS = ["leading", "trailing", "linspace"]


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [2, 30])
def test_dpm_solver_2m(prediction_type, spacing, num_steps):
    scheduler = DPMSolverMultistepScheduler(
        **SCALES, prediction_type=TYPES[prediction_type], timestep_spacing=spacing, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(num_steps)
    # Its leading and linspace lists are those of one step more, without the last.
    timesteps = with_final(scheduler.timesteps.numpy())
    assert_same(ours(DPMSolverMultistep(), timesteps, prediction_type), theirs(scheduler, num_steps))


@pytest.mark.parametrize("num_steps", [3, 20])
def test_dpm_solver_2m_sde_with_the_same_noise(num_steps):
    scheduler = DPMSolverMultistepScheduler(
        **SCALES, timestep_spacing="trailing", algorithm_type="sde-dpmsolver++", final_sigmas_type="zero"
    )
    found = ours(DPMSolverMultistep(stochastic=True), spaced("trailing", num_steps))
    assert_same(found, theirs(scheduler, num_steps, noisy=True))


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [3, 30])
def test_unipc(prediction_type, spacing, num_steps):
    scheduler = UniPCMultistepScheduler(**SCALES, prediction_type=TYPES[prediction_type], timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)
    timesteps = with_final(scheduler.timesteps.numpy())
    assert_same(ours(UniPC(), timesteps, prediction_type), theirs(scheduler, num_steps))


@pytest.mark.parametrize(("spacing", "to_clean"), [("leading", True), ("leading", False), ("trailing", True)])
@pytest.mark.parametrize("num_steps", [2, 5, 50])
def test_pndm(spacing, num_steps, to_clean):
    offset = 1 if spacing == "leading" else 0
    scheduler = PNDMScheduler(
        **SCALES,
        timestep_spacing=spacing,
        steps_offset=offset,
        skip_prk_steps=True,
        set_alpha_to_one=to_clean,
    )
    timesteps = timestep_spacing(spacing, num_steps, SCHEDULE, offset=offset)
    found = ours(PNDM(), with_final(timesteps, final=-1 if to_clean else 0))
    assert_same(found, theirs(scheduler, num_steps))


@pytest.mark.parametrize(("name", "sampler"), [(EulerDiscreteScheduler, Euler()), (HeunDiscreteScheduler, Heun())])
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [2, 10])
def test_euler_and_heun(name, sampler, prediction_type, spacing, num_steps):
    if name is HeunDiscreteScheduler and prediction_type == "x_0":
        pytest.skip("not implemented in diffusers")
    scheduler = name(**SCALES, prediction_type=TYPES[prediction_type], timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)
    # Heun's list names every timestep twice.
    timesteps = with_final(-np.unique(-scheduler.timesteps.numpy()))
    assert_same(ours(sampler, timesteps, prediction_type), theirs(scheduler, num_steps, scaled=True))


@pytest.mark.parametrize(("name", "sampler"), [(EulerDiscreteScheduler, Euler()), (HeunDiscreteScheduler, Heun())])
def test_euler_and_heun_at_karras_levels(name, sampler):
    scheduler = name(**SCALES, timestep_spacing="linspace", use_karras_sigmas=True)
    assert_same(ours(sampler, spaced("karras", 12)), theirs(scheduler, 12, scaled=True))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_with_the_same_noise(spacing, monkeypatch):
    scheduler = DDPMScheduler(**SCALES, clip_sample=False, timestep_spacing=spacing, variance_type="fixed_small")
    draws = iter(range(1, 11))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **options: draw(next(draws)))
    assert_same(ours(DDPM(), spaced(spacing, 10)), theirs(scheduler, 10))


def test_ddim_linspace_of_diffusers_still_has_its_fault():
    # If this fails, diffusers has repaired it: compare the spacing like the others.
    scheduler = DDIMScheduler(**SCALES, clip_sample=False, timestep_spacing="linspace", set_alpha_to_one=True)
    assert np.abs(ours(DDIM(), spaced("linspace", 10)) - theirs(scheduler, 10)).max() > 100 * SAMPLER_ATOL


@pytest.mark.parametrize("quantile", [0.5, 0.995])
def test_dynamic_threshold_as_in_diffusers(quantile):
    scheduler = DDPMScheduler(dynamic_thresholding_ratio=quantile, sample_max_value=1e6)
    x_t = 3 * X_T
    scales = jnp.asarray(0.6), jnp.asarray(0.8)
    found = threshold_x_0(to_prediction(x_t, x_t, *scales, "x_0"), x_t, *scales, quantile)
    np.testing.assert_allclose(found.x_0, scheduler._threshold_sample(torch.from_numpy(np.array(x_t))), atol=1e-6)
    np.testing.assert_allclose(0.6 * found.x_0 + 0.8 * found.eps, x_t, atol=1e-5)
