"""Convolution, group normalization, attention and embeddings against flax.linen and torch, gradients included."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import FLOAT32_ATOL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import get_timestep_embedding

from jaxdiff.models.convolution import Conv, convolve
from jaxdiff.models.embeddings import ConditionEmbedding, sinusoidal_embedding
from jaxdiff.models.normalization import GroupNorm
from jaxdiff.models.resnet import Downsample

X = jax.random.normal(jax.random.key(0), (3, 6, 8, 16))


def output_and_gradients(net, params, x):
    """Return the output, and the gradients of a weighted sum of it by parameters and input."""
    out, pull = jax.vjp(lambda params, x: net.apply({"params": params}, x), params, x)
    return out, *pull(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))


def assert_same(ours, theirs, params, x):
    for a, b in zip(jax.tree.leaves(output_and_gradients(ours, params, x)), output_leaves(theirs, params, x)):
        # Gradients of a kernel are sums over 144 pixels.
        np.testing.assert_allclose(a, b, atol=10 * FLOAT32_ATOL)


def output_leaves(net, params, x):
    return jax.tree.leaves(output_and_gradients(net, params, x))


@pytest.mark.parametrize(("kernel_size", "strides", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (5, 1, 2)])
def test_convolution_as_in_flax(kernel_size, strides, padding):
    theirs = nn.Conv(24, (kernel_size,) * 2, strides, padding)
    params = theirs.init(jax.random.key(1), X)["params"]
    params = {**params, "bias": jnp.linspace(-1, 1, 24)}
    assert_same(Conv(24, kernel_size, strides, padding), theirs, params, X)


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 4, 4), (2, 5, 3), (1, 16, 16), (4, 17, 16), (6, 32, 40)])
def test_convolution_of_few_and_of_many_pixels_as_in_flax(kernel_size, batch, height, width):
    x = jax.random.normal(jax.random.key(3), (batch, height, width, 6))
    theirs = nn.Conv(33, (kernel_size,) * 2)
    params = theirs.init(jax.random.key(1), x)["params"]
    ours = output_leaves(Conv(33, kernel_size, padding=kernel_size // 2), params, x)
    for a, b in zip(ours, output_leaves(theirs, params, x)):
        # Gradients of a kernel are sums over up to 7,680 pixels of order 1: their rounding grows with the root.
        np.testing.assert_allclose(a, b, atol=50 * FLOAT32_ATOL)


def test_bfloat16_convolution_sums_its_gradient_in_float32():
    x = 1 + jax.random.uniform(jax.random.key(3), (4, 32, 32, 8))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 8, 8))

    def total(kernel, dtype):
        return jnp.sum(convolve(x.astype(dtype), kernel.astype(dtype), padding=1).astype(jnp.float32))

    low, full = (jax.grad(total)(kernel, dtype) for dtype in (jnp.bfloat16, jnp.float32))
    # 4,096 numbers between 1 and 2: a sum kept in bfloat16 would stop growing at 512.
    np.testing.assert_allclose(low, full, rtol=0.01)


@pytest.fixture(params=["cpu", "gpu"])
def way(request, monkeypatch):
    """As norms are computed on either kind of device; here a CPU does both."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("groups", [1, 4, 16])
def test_group_norm_as_in_flax(groups, activation):
    class Theirs(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.GroupNorm(groups, epsilon=1e-5, use_fast_variance=False, name="norm")(x)
            return y if activation is None else nn.silu(y)

    params = {"scale": jnp.linspace(0.5, 2, 16), "bias": jnp.linspace(-1, 1, 16)}
    # Off centre and of unequal spread, as features are.
    x = 3 + X * jnp.linspace(0.1, 2, 16)[None, None, None]
    theirs = output_leaves(Theirs(), {"norm": params}, x)
    ours = output_leaves(GroupNorm(groups, activation=activation), params, x)
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, atol=20 * FLOAT32_ATOL, rtol=1e-4)


@pytest.mark.usefixtures("way")
def test_group_norm_of_a_constant_is_its_bias():
    # The variance, a difference of two equal numbers, must not round to below zero.
    net = GroupNorm(4)
    params = {"scale": jnp.ones(16), "bias": jnp.arange(16.0)}
    out = net.apply({"params": params}, jnp.full((2, 4, 4, 16), 1234.567))
    # One part in 10^7 of 1234, over a standard deviation of sqrt(epsilon).
    np.testing.assert_allclose(out, jnp.broadcast_to(jnp.arange(16.0), out.shape), atol=0.1)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("corner", [0, -1])
def test_group_norm_with_one_pixel_far_from_all_others(corner):
    x = np.random.default_rng(0).standard_normal((2, 128, 128, 16)).astype(np.float32)
    x[:, corner, corner] = 300
    found = GroupNorm(4).apply({"params": {"scale": jnp.ones(16), "bias": jnp.zeros(16)}}, jnp.asarray(x))
    groups = x.astype(np.float64).reshape(2, -1, 4, 4)
    mean, variance = (moment(groups, axis=(1, 3), keepdims=True) for moment in (np.mean, np.var))
    expected = (groups - mean) / np.sqrt(variance + 1e-5)
    np.testing.assert_allclose(found, expected.reshape(x.shape), rtol=2e-5, atol=2e-6)


@pytest.mark.usefixtures("way")
def test_group_norm_keeps_float32_statistics_in_bfloat16():
    x = (100 + X).astype(jnp.bfloat16)
    params = {"scale": jnp.ones(16), "bias": jnp.zeros(16)}
    low = GroupNorm(4, dtype=jnp.bfloat16).apply({"params": params}, x)
    full = GroupNorm(4).apply({"params": params}, x.astype(jnp.float32))
    assert low.dtype == jnp.bfloat16
    # Only the result is rounded, to 8 bits; statistics in bfloat16 would lose the whole signal on top of 100.
    np.testing.assert_allclose(low.astype(jnp.float32), full, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_sinusoids_as_in_diffusers(flip, shift):
    t = np.array([0, 1, 37, 999])
    theirs = get_timestep_embedding(torch.from_numpy(t), 32, flip, shift)
    ours = sinusoidal_embedding(jnp.asarray(t), 32, flip, shift)
    # sin(999) in float32 knows its argument to 6e-5.
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-4)


def test_condition_embedding_looks_rows_up():
    net = ConditionEmbedding(3, 8)
    table = jax.random.normal(jax.random.key(2), (4, 8))
    out = net.apply({"params": {"embedding": table}}, jnp.array([3, 0, 2]))
    np.testing.assert_allclose(out, table[jnp.array([3, 0, 2])], atol=FLOAT32_ATOL)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(("height", "width"), [(8, 6), (7, 5)])
def test_downsampling_as_in_diffusers(padding, height, width):
    torch.manual_seed(0)
    theirs = Downsample2D(16, use_conv=True, out_channels=16, padding=padding, name="op")
    kernel, bias = (parameter.detach().numpy() for parameter in (theirs.conv.weight, theirs.conv.bias))
    params = {"conv": {"kernel": jnp.asarray(kernel.transpose(2, 3, 1, 0)), "bias": jnp.asarray(bias)}}
    x = np.random.default_rng(0).standard_normal((2, height, width, 16)).astype(np.float32)
    ours = Downsample(16, padding).apply({"params": params}, jnp.asarray(x))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(ours, expected.transpose(0, 2, 3, 1), atol=FLOAT32_ATOL)
