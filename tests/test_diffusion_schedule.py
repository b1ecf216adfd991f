import chex
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FLOAT64_RTOL
from diffusers import DDIMScheduler, DDPMScheduler

from jaxdiff.diffusion.schedule import check_prediction_type, make_schedule, timestep_spacing, with_final

NAMES = ("linear", "scaled_linear", "cosine")
TORCH_NAMES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_alphas_cumprod_as_in_diffusers(name, zero_terminal_snr):
    theirs = DDIMScheduler(beta_schedule=TORCH_NAMES[name], rescale_betas_zero_snr=zero_terminal_snr)
    ours = make_schedule(name, zero_terminal_snr=zero_terminal_snr)
    # diffusers multiplies 1000 factors in float32, each rounded to 6e-8.
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=2e-3, atol=2e-6)


def test_course_check_values():
    table = make_schedule("linear").alphas_cumprod
    known = {0: 0.9999, 1: 0.99978009, 21: 0.99322036, 481: 0.09395023, 981: 5.78779318e-05}
    for t, value in known.items():
        np.testing.assert_allclose(table[t], value, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_tables_fall_and_stay_on_the_circle(name, zero_terminal_snr):
    schedule = make_schedule(name, 200, zero_terminal_snr=zero_terminal_snr)
    assert np.all(np.diff(schedule.alphas_cumprod) < 0)
    alpha, sigma = schedule.alpha_sigma(jnp.arange(200))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=FLOAT64_RTOL)
    assert (float(alpha[-1]) == 0.0) == zero_terminal_snr
    assert np.isneginf(schedule.logsnr(jnp.int32(199))) == zero_terminal_snr


def test_clean_data_at_minus_one():
    alpha, sigma = make_schedule("cosine").alpha_sigma(jnp.array([-1, 0]))
    assert (float(alpha[0]), float(sigma[0])) == (1.0, 0.0)
    assert sigma[1] > 0


def test_noise_level_is_sigma_over_alpha():
    schedule = make_schedule("linear")
    t = jnp.array([0, 10, 500, 999])
    alpha, sigma = schedule.alpha_sigma(t)
    np.testing.assert_allclose(schedule.noise_level(t), sigma / alpha, rtol=1e-5)
    np.testing.assert_allclose(schedule.logsnr(t), 2 * jnp.log(alpha / sigma), rtol=1e-4)


def test_small_noise_keeps_its_precision():
    betas = np.linspace(1e-4, 0.02, 1000)
    exact = np.sqrt(1 - np.cumprod(1 - betas))
    np.testing.assert_allclose(make_schedule("linear").sqrt_one_minus_alphas_cumprod, exact, rtol=FLOAT64_RTOL)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50, 999, 1000])
def test_spacing_as_in_diffusers(spacing, num_steps):
    theirs = DDPMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(num_steps)
    ours = timestep_spacing(spacing, num_steps, 1000)
    # NumPy makes linspace(0, T-1, 1) = 0: diffusers then samples from pure noise as if it were clean data.
    if not (spacing == "linspace" and num_steps == 1):
        np.testing.assert_array_equal(ours, theirs.timesteps.numpy())
    assert ours.max() < 1000
    assert np.all(np.diff(with_final(ours)) < 0)


def test_wrong_values_are_named(unchecked):
    with pytest.raises(ValueError, match=r"num_steps must lie in 1\.\.10, got 11"):
        timestep_spacing("leading", 11, 10)
    with pytest.raises(ValueError, match="unknown spacing 'even'"):
        timestep_spacing("even", 5, 10)
    with pytest.raises(ValueError, match="unknown schedule 'exp'"):
        make_schedule("exp")
    with pytest.raises(ValueError, match="beta_start <= beta_end"):
        make_schedule("linear", beta_start=0.1, beta_end=0.01)
    with pytest.raises(ValueError, match="fall strictly"):
        with_final(np.array([5, 5, 1], np.int32))
    with pytest.raises(ValueError, match="eps prediction is undefined"):
        check_prediction_type(make_schedule("linear", zero_terminal_snr=True), "eps")


def test_schedule_is_a_pytree():
    import jax

    schedule = make_schedule("linear", 10)
    chex.assert_trees_all_equal(jax.jit(lambda s: s)(schedule), schedule)
