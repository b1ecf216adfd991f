import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import FLOAT32_ATOL
from diffusers import UNet2DModel

from jaxdiff.models.unet import PRESETS, UNet, UNetConfig

pytestmark = pytest.mark.usefixtures("quick_commands")

SMALL = UNetConfig(
    block_out_channels=(16, 32),
    layers_per_block=2,
    attention=(False, True),
    attention_head_dim=8,
    norm_num_groups=8,
)
X = jax.random.normal(jax.random.key(5), (2, 8, 8, 3))
T = jnp.array([3, 800])


def torch_twin(config: UNetConfig) -> UNet2DModel:
    torch.manual_seed(0)
    kinds = [("AttnDownBlock2D", "AttnUpBlock2D") if a else ("DownBlock2D", "UpBlock2D") for a in config.attention]
    twin = UNet2DModel(
        sample_size=8,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=tuple(down for down, _ in kinds),
        up_block_types=tuple(up for _, up in reversed(kinds)),
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        attn_norm_num_groups=config.norm_num_groups,
        norm_eps=config.norm_eps,
        flip_sin_to_cos=config.flip_sin_to_cos,
        freq_shift=config.freq_shift,
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
    )
    return twin.eval()


def from_torch(twin: torch.nn.Module) -> dict:
    """Rename and transpose every tensor; each is used exactly once."""
    params: dict = {}
    for key, tensor in twin.state_dict().items():
        *path, leaf = re.sub(r"\.(\d+)", r"_\1", key).split(".")
        value = tensor.numpy()
        if leaf == "weight":
            leaf = "scale" if "norm" in path[-1] else "kernel"
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        node = params
        for name in path:
            node = node.setdefault(name, {})
        assert leaf not in node
        node[leaf] = jnp.asarray(value)
    return params


@pytest.mark.parametrize("change", [{}, {"scale_shift": True}, {"flip_sin_to_cos": False, "freq_shift": 1.0}])
def test_same_tensors_same_output_as_diffusers(change):
    config = dataclasses.replace(SMALL, **change)
    twin = torch_twin(config)
    params = from_torch(twin)
    shapes = jax.eval_shape(UNet(config).init, jax.random.key(0), X, T)["params"]
    chex.assert_trees_all_equal_shapes(params, shapes)
    ours = jax.jit(UNet(config).apply)({"params": params}, X, T)
    with torch.no_grad():
        theirs = twin(torch.from_numpy(np.array(X).transpose(0, 3, 1, 2)), torch.from_numpy(np.array(T))).sample
    # Outputs are of order 1 and pass through about 30 layers.
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=3 * FLOAT32_ATOL, rtol=1e-4)


def count(config: UNetConfig) -> int:
    labels = jnp.zeros((1,), jnp.int32)
    size = config.size_divisor
    shapes = jax.eval_shape(UNet(config).init, jax.random.key(0), jnp.zeros((1, size, size, 3)), labels, labels, labels)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_help_states_the_parameter_counts():
    import inspect

    from jaxdiff import train_cfg

    help_text = inspect.getsource(train_cfg)
    for name, fields in PRESETS.items():
        millions = count(UNetConfig(**fields, num_classes=10, num_domains=2)) / 1e6
        assert f"{name} {millions:.1f} M" in help_text


@pytest.mark.slow
def test_a_fresh_network_predicts_zero():
    net = UNet(dataclasses.replace(SMALL, num_classes=3, num_domains=2))
    labels = jnp.array([0, 3]), jnp.array([1, 2])
    params = jax.jit(net.init)(jax.random.key(0), X, T, *labels)
    np.testing.assert_array_equal(jax.jit(net.apply)(params, X, T, *labels), np.zeros_like(X))


def random_params(net, *inputs):
    """Return noise for every leaf, so that no zero hides the rest; scales are about 1."""
    shapes, rng = jax.eval_shape(net.init, jax.random.key(0), *inputs), np.random.default_rng(1)

    def draw(path, leaf):
        around = 1.0 if path[-1].key == "scale" else 0.0
        return (around + 0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_every_condition_and_every_image_counts_alone(patch_size):
    net = UNet(dataclasses.replace(SMALL, num_classes=3, num_domains=2, patch_size=patch_size))
    labels = jnp.array([0, 3]), jnp.array([1, 2])
    params = random_params(net, X, T, *labels)
    apply = jax.jit(net.apply)
    base = apply(params, X, T, *labels)
    assert base.shape == X.shape
    for changed in (
        (X, T, jnp.array([1, 3]), labels[1]),
        (X, T, labels[0], jnp.array([0, 2])),
        (X, jnp.array([4, 800]), *labels),
    ):
        out = apply(params, *changed)
        assert float(jnp.abs(out[0] - base[0]).max()) > 1e-4
        np.testing.assert_allclose(out[1], base[1], atol=FLOAT32_ATOL)


def test_bfloat16_computes_low_and_keeps_parameters_high():
    net = UNet(SMALL, dtype=jnp.bfloat16)
    params = random_params(net, X, T)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out = jax.jit(net.apply)(params, X, T)
    full = jax.jit(UNet(SMALL).apply)(params, X, T)
    assert out.dtype == jnp.float32
    # bfloat16 keeps 8 bits: a few per cent of the output's size after 30 layers, but not equal to float32.
    error = float(jnp.abs(out - full).mean() / jnp.abs(full).mean())
    assert 1e-4 < error < 0.05


def test_wrong_configs_are_named():
    with pytest.raises(ValueError, match="one entry a level"):
        UNetConfig(block_out_channels=(32, 64))
    with pytest.raises(ValueError, match="do not split into 32 groups"):
        UNetConfig(block_out_channels=(40,), attention=(False,))
    with pytest.raises(ValueError, match="class_labels are needed if and only if"):
        UNet(SMALL).init(jax.random.key(0), X, T, jnp.array([0, 1]))
