import chex
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FLOAT64_RTOL
from diffusers import DDIMScheduler

from jaxdiff.diffusion.schedule import check_prediction_type, make_schedule

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


def test_wrong_values_are_named(unchecked):
    with pytest.raises(ValueError, match="unknown schedule 'exp'"):
        make_schedule("exp")
    with pytest.raises(ValueError, match="beta_start <= beta_end"):
        make_schedule("linear", beta_start=0.1, beta_end=0.01)
    with pytest.raises(ValueError, match="eps prediction is undefined"):
        check_prediction_type(make_schedule("linear", zero_terminal_snr=True), "eps")


def test_schedule_is_a_pytree():
    import jax

    schedule = make_schedule("linear", 10)
    chex.assert_trees_all_equal(jax.jit(lambda s: s)(schedule), schedule)


def test_between_the_integers_the_log_noise_level_is_linear():
    schedule = make_schedule("cosine", 100)
    levels = np.log(np.asarray(schedule.noise_level(jnp.arange(100)), np.float64))
    between = jnp.array([0.0, 3.25, 98.5])
    expected = np.array([levels[0], 0.75 * levels[3] + 0.25 * levels[4], (levels[98] + levels[99]) / 2])
    np.testing.assert_allclose(np.log(schedule.noise_level(between)), expected, rtol=1e-5)
    np.testing.assert_allclose(schedule.timestep_at(jnp.exp(jnp.asarray(expected, jnp.float32))), between, atol=1e-4)
    alpha, sigma = schedule.alpha_sigma(between)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-6)
    np.testing.assert_allclose(sigma / alpha, np.exp(expected), rtol=1e-5)


@pytest.mark.parametrize("kind", [jnp.int32, jnp.float32])
def test_minus_one_is_clean_data(kind):
    schedule = make_schedule("linear", 10)
    clean = jnp.asarray(-1, kind)
    assert [float(value) for value in schedule.alpha_sigma(clean)] == [1.0, 0.0]
    assert float(schedule.logsnr(clean)) == np.inf
    assert float(schedule.noise_level(clean)) == 0.0
