import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FLOAT32_ATOL

from jaxdiff.diffusion.guidance import chain_weights, guide, within_interval
from jaxdiff.diffusion.prediction import Prediction
from jaxdiff.diffusion.schedule import make_schedule

X = jnp.arange(24.0).reshape(2, 2, 2, 3)
T = jnp.int32(5)


class Counting:
    """A denoiser that answers with its condition and remembers the batch sizes that it was called with."""

    def __init__(self):
        self.batch_sizes = []

    def __call__(self, x_t, t, condition):
        self.batch_sizes.append(x_t.shape[0])
        value = jnp.broadcast_to(condition[:, None, None, None], x_t.shape)
        return Prediction(value, 2 * value + x_t)


def full(value):
    return jnp.full((2,), value)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_exact_at_both_ends_and_at_half_the_cost(scale):
    denoise = Counting()
    weights = chain_weights((scale,))
    prediction = guide(denoise, list(zip(weights, (full(0.3), full(0.7)))))(X, T)
    alone = Counting()(X, T, full((0.3, 0.7)[int(scale)]))
    np.testing.assert_array_equal(prediction.x_0, alone.x_0)
    np.testing.assert_array_equal(prediction.eps, alone.eps)
    assert denoise.batch_sizes == [2]


def test_linear_in_the_scale_and_one_doubled_batch():
    denoise = Counting()
    for scale in (0.5, 2.0, 7.5):
        prediction = guide(denoise, list(zip(chain_weights((scale,)), (full(1.0), full(4.0)))))(X, T)
        np.testing.assert_allclose(prediction.x_0, 1.0 + scale * 3.0, atol=FLOAT32_ATOL)
        np.testing.assert_allclose(prediction.eps, 2 * (1.0 + scale * 3.0) + X, rtol=1e-5)
    assert denoise.batch_sizes == [4, 4, 4]


def test_two_scales_as_in_instruct_pix2pix():
    # e(0) + s_1 (e(c1) - e(0)) + s_2 (e(c1, c2) - e(c1)), the paper's own order of terms.
    nothing, first, both = 1.0, 3.0, 10.0
    weights = chain_weights((1.5, 4.0))
    expected = nothing + 1.5 * (first - nothing) + 4.0 * (both - first)
    denoise = Counting()
    prediction = guide(denoise, list(zip(weights, (full(nothing), full(first), full(both)))))(X, T)
    np.testing.assert_allclose(prediction.x_0, expected, rtol=1e-6)
    assert denoise.batch_sizes == [6]


def test_equal_scales_are_plain_guidance():
    assert chain_weights((3.0, 3.0)) == (-2.0, 0.0, 3.0)
    assert chain_weights((1.0, 1.0)) == (0.0, 0.0, 1.0)


def test_weights_must_sum_to_one():
    with pytest.raises(ValueError, match="must sum to 1"):
        guide(Counting(), [(0.5, full(1.0))])


def test_interval_guides_only_inside():
    schedule = make_schedule("linear")
    levels = np.sqrt(1 / np.asarray(schedule.alphas_cumprod, np.float64) - 1)
    guided = guide(Counting(), [(-1.0, full(0.0)), (2.0, full(1.0))])
    unguided = guide(Counting(), [(1.0, full(1.0))])
    denoise = within_interval(guided, unguided, schedule, 0.5, 3.0)
    for t in (0, 100, 300, 600, 999):
        inside = 0.5 <= levels[t] <= 3.0
        np.testing.assert_array_equal(denoise(X, jnp.int32(t)).x_0, 2.0 if inside else 1.0)
