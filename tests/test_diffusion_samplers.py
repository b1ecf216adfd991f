from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import FLOAT32_ATOL, SAMPLER_ATOL
from diffusers import DDIMScheduler, DDPMScheduler

from jaxdiff.diffusion.edm import Churn, Euler, Heun
from jaxdiff.diffusion.multistep import PNDM, DPMSolverMultistep, UniPC
from jaxdiff.diffusion.prediction import Prediction, to_prediction
from jaxdiff.diffusion.samplers import DDIM, DDPM, image_keys, posterior_std, sample, starting_noise
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.diffusion.timesteps import timestep_spacing, with_final

pytestmark = pytest.mark.usefixtures("quick_commands")

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


def exact_flow(schedule, x_T, t, s=-1):
    """Return where the probability flow ODE ends: it keeps the quantile of a Gaussian."""
    a = np.append(np.asarray(schedule.alphas_cumprod, np.float64), 1.0)
    mean, spread = np.sqrt(a) * MEAN, np.sqrt(a * STD**2 + 1 - a)
    return mean[s] + spread[s] * (np.asarray(x_T, np.float64) - mean[t]) / spread[t]


def test_ddim_converges_with_order_one():
    schedule = make_schedule("linear")
    keys = keys_of(8)
    x_T = starting_noise(keys, SHAPE)
    steps, errors = np.array([10, 20, 40, 80]), []
    for num_steps in steps:
        timesteps = with_final(timestep_spacing("trailing", int(num_steps), schedule))
        x_0 = sample(gaussian_denoiser(schedule), x_T, keys, schedule, timesteps, DDIM())
        errors.append(np.sqrt(np.mean((x_0 - exact_flow(schedule, x_T, 999)) ** 2)))
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope + 1) < 0.2, (slope, errors)


@pytest.mark.parametrize(
    "sampler",
    [DDIM(0.5), DDIM(1.0), DDPM(), DPMSolverMultistep(stochastic=True), Euler(Churn(5.0)), Heun(Churn(50.0))],
    ids=lambda sampler: f"{sampler}"[:32],
)
def test_stochastic_samplers_keep_mean_and_variance(sampler):
    schedule = make_schedule("linear")
    keys = keys_of(400)
    timesteps = with_final(timestep_spacing("trailing", 250, schedule))
    x_0 = np.asarray(
        sample(gaussian_denoiser(schedule), starting_noise(keys, SHAPE), keys, schedule, timesteps, sampler)
    )
    # 19,200 independent values: standard errors 0.5/139 = 0.0036 (mean) and 0.0026 (std); four of them, and the
    # discretisation error of 250 steps, which shrinks the spread by about 1 %.
    assert abs(x_0.mean() - MEAN) < 0.0144
    assert abs(x_0.std() - STD) < 0.0104 + 0.01 * STD


def test_direction_without_noise_would_be_caught():
    # The fault of three JAX code bases: the direction is shortened for eta > 0 but no noise is added.
    schedule = make_schedule("linear")
    keys = keys_of(400)

    class Faulty(DDIM):
        def step(self, schedule, denoise, x_t, memory, move, draw):
            return super().step(schedule, denoise, x_t, memory, move, lambda: jnp.zeros_like(x_t))

    timesteps = with_final(timestep_spacing("trailing", 250, schedule))
    x_0 = sample(gaussian_denoiser(schedule), starting_noise(keys, SHAPE), keys, schedule, timesteps, Faulty(1.0))
    assert np.asarray(x_0).std() < 0.7 * STD


def test_ddim_with_eta_one_is_the_ddpm_posterior():
    schedule = make_schedule("linear", 50)
    keys = keys_of(3)
    x_T = starting_noise(keys, SHAPE)
    timesteps = with_final(np.arange(49, -1, -1, dtype=np.int32))
    run = partial(sample, gaussian_denoiser(schedule), x_T, keys, schedule, timesteps)
    np.testing.assert_allclose(run(DDIM(1.0)), run(DDPM()), atol=SAMPLER_ATOL)


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

    timesteps = with_final(timestep_spacing(spacing, num_steps, schedule))
    ours = sample(denoise, x_T, keys, schedule, timesteps, DDIM())
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
    timesteps = with_final(timestep_spacing("leading", 20, schedule))
    drawn = []

    def denoise(x_t, t):
        alpha, sigma = schedule.alpha_sigma(t)
        return to_prediction(toy_network(x_t, t, jnp), x_t, alpha, sigma, "eps")

    class Recording(DDIM):
        def step(self, schedule, denoise, x_t, memory, move, draw):
            noise = draw()
            jax.debug.callback(lambda n: drawn.append(np.array(n)), noise, ordered=True)
            return super().step(schedule, denoise, x_t, memory, move, lambda: noise)

    ours = sample(denoise, x_T, keys, schedule, timesteps, Recording(eta))
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
        # diffusers computes in float32; the closed form in float64.
        a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        exact = (1 - a[t - 10]) / (1 - a[t]) * (1 - a[t] / a[t - 10]) if t > 10 else None
        if exact is not None:
            np.testing.assert_allclose(float(ours) ** 2, exact, rtol=1e-5)
    assert float(posterior_std(schedule, jnp.int32(0), jnp.int32(-1))) == 0.0


def test_a_batch_of_n_equals_n_singles():
    schedule = make_schedule("linear")
    timesteps = with_final(timestep_spacing("leading", 10, schedule))

    def run(keys):
        x_T = starting_noise(keys, SHAPE)
        return sample(gaussian_denoiser(schedule), x_T, keys, schedule, timesteps, DDIM(1.0))

    together = run(keys_of(5))
    for i in (0, 3, 4):
        alone = run(image_keys(jax.random.key(0), jnp.array([i])))
        np.testing.assert_allclose(alone[0], together[i], atol=SAMPLER_ATOL)


def test_trajectory_holds_every_state_and_changes_nothing():
    schedule = make_schedule("linear")
    keys = keys_of(2)
    x_T = starting_noise(keys, SHAPE)
    timesteps = with_final(timestep_spacing("leading", 6, schedule))
    run = partial(sample, gaussian_denoiser(schedule), x_T, keys, schedule, timesteps, DDIM())
    x_0, trajectory = run(trajectory=True)
    # Another program, whose sums may be taken in another order.
    np.testing.assert_allclose(x_0, run(), atol=FLOAT32_ATOL)
    np.testing.assert_array_equal(trajectory.x_t[0], x_T)
    np.testing.assert_array_equal(trajectory.x_t[-1], x_0)
    assert trajectory.x_t.shape[0] == 7
    np.testing.assert_allclose(trajectory.x_0[-1], x_0, atol=SAMPLER_ATOL)


@pytest.mark.parametrize("sampler", [DDIM(0.5), Heun(Churn(1.0)), UniPC(), PNDM()], ids=lambda value: f"{value}"[:9])
def test_compiled_program_does_not_grow_with_steps(sampler):
    schedule = make_schedule("linear")
    keys = keys_of(1)

    def size(num_steps):
        timesteps = with_final(timestep_spacing("leading", num_steps, schedule))

        def run(x_T):
            return sample(gaussian_denoiser(schedule), x_T, keys, schedule, timesteps, sampler)

        return jax.jit(run).lower(starting_noise(keys, SHAPE)).as_text().count("\n")

    assert size(500) == size(5)


DETERMINISTIC = [DDIM(), Euler(), Heun(), DPMSolverMultistep(), UniPC(), PNDM()]
EVERY = [*DETERMINISTIC, DDIM(0.5), DDPM(), DPMSolverMultistep(stochastic=True), Euler(Churn(5.0)), Heun(Churn(5.0))]


@pytest.mark.parametrize("sampler", EVERY, ids=lambda sampler: f"{sampler}"[:32])
@pytest.mark.parametrize(
    ("timesteps", "zero_terminal_snr"),
    [
        ([999, 700, 300, 20], False),
        ([999, 998, 500], False),
        ([640], False),
        ([999.0, 500.5, 3.25], False),
        ([5, 4, 3, 2, 1, 0], False),
        ([999, 900, 500, 0], True),
        ([999.0, 998.0, 997.5, 500.0], True),
    ],
    ids=str,
)
def test_every_sampler_ends_at_the_clean_image_from_any_list(sampler, timesteps, zero_terminal_snr):
    # If all data is one picture, the exact denoiser always sees it, and every process must end there.
    schedule = make_schedule("linear", zero_terminal_snr=zero_terminal_snr)
    picture = jnp.linspace(-1, 1, 48).reshape(1, *SHAPE)

    def denoise(x_t, t):
        alpha, sigma = schedule.alpha_sigma(t)
        return Prediction(jnp.broadcast_to(picture, x_t.shape), (x_t - alpha * picture) / sigma)

    keys = keys_of(2)
    x_0 = sample(denoise, starting_noise(keys, SHAPE), keys, schedule, with_final(np.array(timesteps)), sampler)
    np.testing.assert_allclose(x_0, jnp.broadcast_to(picture, x_0.shape), atol=SAMPLER_ATOL)


@pytest.mark.parametrize(
    ("sampler", "order"),
    [(DDIM(), 1), (Euler(), 1), (Heun(), 2), (DPMSolverMultistep(), 2), (UniPC(), 3)],
    ids=lambda value: f"{value}"[:20],
)
def test_order_of_convergence(sampler, order):
    # UniPC's predictor has order 2, and its corrector one more (arXiv 2302.04867, theorem 3.1).
    # Equal steps in lambda, so that no step is much longer than the others; down to t = 0, where the flow is exact.
    schedule = make_schedule("linear")
    lambdas = 0.5 * np.asarray(schedule.logsnrs, np.float64)
    keys = keys_of(8)
    x_T = starting_noise(keys, SHAPE)
    steps, errors = np.array([20, 40, 80]), []
    for num_steps in steps:
        walk = np.interp(np.linspace(lambdas[-1], lambdas[0], num_steps + 1), lambdas[::-1], np.arange(999, -1, -1))
        timesteps = with_final(walk[:-1], final=0)
        x_0 = sample(gaussian_denoiser(schedule), x_T, keys, schedule, timesteps, sampler)
        errors.append(np.sqrt(np.mean((x_0 - exact_flow(schedule, x_T, 999, 0)) ** 2)))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.3, (slope, errors)


def test_pndm_has_order_two_on_equal_steps():
    schedule = make_schedule("linear")
    keys = keys_of(8)
    x_T = starting_noise(keys, SHAPE)
    steps, errors = np.array([40, 80, 160]), []
    for num_steps in steps:
        timesteps = with_final(np.linspace(900, 100, num_steps + 1)[:-1], final=0)
        timesteps[-1] = 100
        x_s = sample(gaussian_denoiser(schedule), x_T, keys, schedule, timesteps, PNDM())
        errors.append(np.sqrt(np.mean((x_s - exact_flow(schedule, x_T, 900, 100)) ** 2)))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - 2) < 0.3, (slope, errors)


def test_every_image_may_have_its_own_eta():
    schedule = make_schedule("linear")
    keys = keys_of(3)
    x_T = starting_noise(keys, SHAPE)
    timesteps = with_final(timestep_spacing("leading", 10, schedule))
    run = partial(sample, gaussian_denoiser(schedule), x_T, keys, schedule, timesteps)
    etas = (0.0, 0.5, 1.0)
    together = run(DDIM(jnp.array(etas)))
    for i, eta in enumerate(etas):
        np.testing.assert_allclose(together[i], run(DDIM(eta))[i], atol=SAMPLER_ATOL)


def test_the_gradient_in_eta_is_finite():
    schedule = make_schedule("linear")
    keys = keys_of(1)
    timesteps = with_final(timestep_spacing("leading", 5, schedule))

    def mean(eta):
        x_T = starting_noise(keys, SHAPE)
        return sample(gaussian_denoiser(schedule), x_T, keys, schedule, timesteps, DDIM(eta)).mean()

    assert np.isfinite(jax.grad(mean)(jnp.float32(0.5)))


def test_wrong_values_are_named(unchecked):
    schedule = make_schedule("linear", 10)
    keys = keys_of(2)
    run = partial(sample, gaussian_denoiser(schedule), starting_noise(keys, SHAPE))
    with pytest.raises(ValueError, match=r"timesteps must lie in 0\.\.9, got 10"):
        run(keys, schedule, with_final(np.array([10, 5])), DDIM())
    with pytest.raises(ValueError, match="1 keys, 2 images"):
        run(keys[:1], schedule, with_final(np.array([9, 5])), DDIM())
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\], got 2"):
        DDIM(2.0)
    with pytest.raises(ValueError, match="churn needs"):
        Churn(amount=-1)
