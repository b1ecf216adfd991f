import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FLOAT32_ATOL
from scipy.spatial import geometric_slerp
from scipy.stats import chi

from jaxdiff.diffusion.interpolation import expected_norm, lerp, normal_lerp, slerp

X, Y = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
ALPHAS = jnp.linspace(0, 1, 11)


@pytest.mark.parametrize("way", [lerp, slerp, normal_lerp])
def test_ends_are_the_two_noises(way):
    between = way(X, Y, ALPHAS)
    np.testing.assert_allclose(between[0], X, atol=FLOAT32_ATOL)
    np.testing.assert_allclose(between[-1], Y, atol=FLOAT32_ATOL)


@pytest.mark.parametrize("pair", [(X, Y), (X, X + 0.01 * Y), (X, 0.02 * Y - X)], ids=["far", "near", "opposite"])
def test_slerp_of_unit_vectors_is_scipys(pair):
    flat = [np.asarray(value, np.float64).ravel() for value in pair]
    x, y = (value / np.linalg.norm(value) for value in flat)
    found = slerp(*(jnp.asarray(value, jnp.float32).reshape(X.shape) for value in (x, y)), ALPHAS)
    np.testing.assert_allclose(found.reshape(11, -1), geometric_slerp(x, y, np.asarray(ALPHAS)), atol=FLOAT32_ATOL)


def test_slerp_of_parallel_noises_is_the_line_between_them():
    for other in (X, 2 * X, -X):
        np.testing.assert_allclose(slerp(X, other, ALPHAS), lerp(X, other, ALPHAS), atol=FLOAT32_ATOL)


def test_extrapolation_goes_on():
    np.testing.assert_allclose(lerp(X, Y, jnp.array([-1.0]))[0], 2 * X - Y, atol=FLOAT32_ATOL)


def test_norms_tell_why_lerp_greys_out():
    # The closed forms for independent noise, in 196,608 dimensions as at 256x256 pixels.
    x, y = jax.random.normal(jax.random.key(1), (2, 256, 256, 3))
    norm = expected_norm(x.size)
    half = jnp.array([0.5])
    for way, share in ((lerp, np.sqrt(0.5)), (slerp, 1.0), (normal_lerp, 1.0)):
        assert float(jnp.linalg.norm(way(x, y, half))) / norm == pytest.approx(share, abs=0.005)
    assert np.asarray(normal_lerp(x, y, half)).std() == pytest.approx(1.0, abs=0.005)


@pytest.mark.parametrize("size", [1, 3, 768, 196_608])
def test_expected_norm_is_that_of_the_chi_distribution(size):
    assert expected_norm(size) == pytest.approx(chi(size).mean(), rel=1e-6)
