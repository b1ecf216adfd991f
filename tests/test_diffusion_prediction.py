import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FLOAT32_ATOL
from scipy.integrate import quad

from jaxdiff.diffusion.loss import diffusion_loss, loss_weight, q_sample
from jaxdiff.diffusion.prediction import clip_x_0, to_prediction, to_target
from jaxdiff.diffusion.schedule import make_schedule

TYPES = ("eps", "x_0", "v")


@pytest.fixture
def noisy():
    keys = jax.random.split(jax.random.key(0))
    x_0, eps = (jax.random.normal(key, (5, 4, 4, 3)) for key in keys)
    alpha_t, sigma_t = make_schedule("cosine").alpha_sigma(jnp.array([0, 100, 500, 800, 950]))
    return x_0, eps, alpha_t, sigma_t, q_sample(x_0, eps, alpha_t, sigma_t)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_perfect_network_gives_back_image_and_noise(noisy, prediction_type):
    x_0, eps, alpha_t, sigma_t, x_t = noisy
    target = to_target(x_0, eps, alpha_t, sigma_t, prediction_type)
    prediction = to_prediction(target, x_t, alpha_t, sigma_t, prediction_type)
    # Dividing by a small alpha_t or sigma_t (here 0.01) magnifies float32 rounding a hundredfold.
    np.testing.assert_allclose(prediction.x_0, x_0, atol=100 * FLOAT32_ATOL)
    np.testing.assert_allclose(prediction.eps, eps, atol=100 * FLOAT32_ATOL)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_any_output_stays_consistent_with_x_t(noisy, prediction_type):
    x_0, _, alpha_t, sigma_t, x_t = noisy
    output = jax.random.normal(jax.random.key(9), x_0.shape)
    prediction = to_prediction(output, x_t, alpha_t, sigma_t, prediction_type)
    clipped = clip_x_0(prediction, x_t, alpha_t, sigma_t)
    assert float(jnp.abs(clipped.x_0).max()) <= 1.0
    for p in (prediction, clipped):
        np.testing.assert_allclose(q_sample(p.x_0, p.eps, alpha_t, sigma_t), x_t, atol=FLOAT32_ATOL)


def test_velocity_is_the_derivative_along_the_circle(noisy):
    # With alpha = cos(phi), sigma = sin(phi), v is d x_t / d phi: checked by a float64 difference quotient.
    x_0, eps, *_ = (np.asarray(a, np.float64) for a in noisy)
    phi, h = 0.7, 1e-6
    slope = (np.cos(phi + h) * x_0 + np.sin(phi + h) * eps - np.cos(phi - h) * x_0 - np.sin(phi - h) * eps) / (2 * h)
    scales = jnp.float32(np.cos(phi)), jnp.float32(np.sin(phi))
    v = to_target(jnp.asarray(x_0, jnp.float32), jnp.asarray(eps, jnp.float32), *scales, "v")
    np.testing.assert_allclose(v, slope, atol=FLOAT32_ATOL)


def test_no_noise_gives_no_nan(noisy):
    x_0, *_ = noisy
    one, zero = jnp.float32(1), jnp.float32(0)
    for prediction in (to_prediction(x_0, x_0, one, zero, "x_0"), to_prediction(x_0, x_0, zero, one, "v")):
        assert all(np.isfinite(part).all() for part in prediction)


# The weights, written independently: the paper's weight is on the x_0 error (min-SNR) or on the eps error
# (sigmoid); a perfect-but-for-one-error network has eps_mse = snr * x_0_mse and eps_mse = alpha^2 * v_mse.
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("weighting", ["min_snr", "sigmoid"])
def test_weight_table_against_the_papers(weighting, prediction_type):
    logsnr = np.linspace(-15, 15, 61)
    snr = np.exp(logsnr)
    alpha_squared = snr / (1 + snr)
    x_0_errors_per_own_error = {"x_0": np.ones_like(snr), "eps": 1 / snr, "v": alpha_squared / snr}
    weight_on_x_0 = {"min_snr": np.minimum(snr, 5.0), "sigmoid": snr / (1 + np.exp(logsnr - 2.0))}
    expected = weight_on_x_0[weighting] * x_0_errors_per_own_error[prediction_type]
    ours = loss_weight(jnp.asarray(logsnr, jnp.float32), weighting, prediction_type, gamma=5.0, bias=2.0)
    np.testing.assert_allclose(ours, expected, rtol=2e-5)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_sigmoid_weight_averages_over_logsnr_whatever_the_schedule(name):
    # The papers' loss is an integral over logsnr; an error that is a smooth function of it is integrated by SciPy.
    schedule = make_schedule(name)
    t = jnp.arange(1000)
    logsnr = schedule.logsnr(t)
    weight = loss_weight(logsnr, "sigmoid", "eps", logsnr_slope=schedule.logsnr_slope(t))
    ours = float(jnp.mean(weight / (1 + logsnr**2)))
    ends = float(logsnr[-1]), float(logsnr[0])
    exact, _ = quad(lambda x: 1 / (1 + np.exp(x - 2.0)) / (1 + x**2), *ends)
    # A sum over 1,000 steps that cuts half a step at either end.
    assert abs(ours / exact - 1) < 0.01


@pytest.mark.parametrize("weighting", ["constant", "min_snr", "sigmoid"])
@pytest.mark.parametrize("prediction_type", ["x_0", "v"])
def test_weights_are_finite_at_zero_terminal_snr(weighting, prediction_type):
    weight = loss_weight(jnp.array([-jnp.inf, -80.0, 80.0]), weighting, prediction_type)
    assert np.isfinite(weight).all()
    assert (weight >= 0).all()


@pytest.mark.parametrize("weighting", ["constant", "min_snr", "sigmoid"])
def test_a_weighted_loss_does_not_depend_on_what_is_predicted(noisy, weighting):
    # Two networks that make the same error in x_t's decomposition must get the same weighted loss.
    x_0, eps, alpha_t, sigma_t, x_t = noisy
    wrong_x_0 = x_0 + 0.1 * jax.random.normal(jax.random.key(3), x_0.shape)
    wrong_eps = to_prediction(wrong_x_0, x_t, alpha_t, sigma_t, "x_0").eps
    logsnr = 2 * jnp.log(alpha_t / sigma_t)
    losses = {}
    for prediction_type in TYPES:
        output = to_target(wrong_x_0, wrong_eps, alpha_t, sigma_t, prediction_type)
        losses[prediction_type] = diffusion_loss(output, x_0, eps, alpha_t, sigma_t, logsnr, prediction_type, weighting)
    if weighting == "constant":
        snr = jnp.exp(logsnr)
        np.testing.assert_allclose(losses["eps"], snr * losses["x_0"], rtol=1e-3)
    else:
        # Noise near 0.01 or signal near 0.08 costs digits in float32.
        np.testing.assert_allclose(losses["eps"], losses["x_0"], rtol=2e-3)
        np.testing.assert_allclose(losses["v"], losses["x_0"], rtol=2e-3)


def test_unknown_names_are_named(unchecked):
    with pytest.raises(ValueError, match="unknown weighting 'p2'"):
        loss_weight(jnp.zeros(1), "p2", "eps")
    with pytest.raises(ValueError, match="unknown prediction type 'score'"):
        to_target(jnp.zeros((1, 2, 2, 1)), jnp.zeros((1, 2, 2, 1)), jnp.float32(1), jnp.float32(0), "score")
