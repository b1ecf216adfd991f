"""The latent UNet and the autoencoder against diffusers' torch classes, from the same weights and inputs."""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from stable_diffusion_twins import SIDE, make_autoencoder, make_unet

from jaxdiff import FlaxAutoencoderKL, FlaxUNet2DConditionModel
from jaxdiff.models import attention
from jaxdiff.models.attention import attend, why_not_cudnn
from jaxdiff.models.autoencoder import LatentNormal
from jaxdiff.models.spatial_transformer import TEXT, project_context

pytestmark = pytest.mark.usefixtures("quick_commands")

CLOSE = {"rtol": 0, "atol": 1e-5}
"""Both sides add up the same products in another order."""


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


UNETS = {
    "v1": {},
    "v2": {"use_linear_projection": True, "attention_head_dim": (4, 8), "upcast_attention": True},
    "two layers, three levels": {
        "layers_per_block": 2,
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "no transformer above": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "other numbers": {"in_channels": 9, "norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1},
}


@pytest.mark.parametrize("changes", UNETS.values(), ids=UNETS)
def test_the_unet_is_that_of_diffusers(tmp_path, changes):
    twin = make_unet(**changes)
    twin.save_pretrained(tmp_path)
    x_t, t, context = draw(2, twin.config.in_channels, SIDE, SIDE), np.array([3, 980]), draw(2, 7, 32, seed=1)
    with torch.no_grad():
        expected = twin(*map(torch.from_numpy, (x_t, t, context))).sample
    model, params = FlaxUNet2DConditionModel.from_pretrained(tmp_path)
    found = jax.jit(model.apply)({"params": params}, x_t, t, context).sample
    assert float(expected.std()) > 0.05
    np.testing.assert_allclose(found, expected.numpy(), **CLOSE)


# Below an odd size lies a level that is not half as large.
@pytest.mark.parametrize("padding", [1, 0])
def test_the_unet_takes_latents_of_odd_sizes_as_that_of_diffusers(tmp_path, padding):
    twin = make_unet(**UNETS["two layers, three levels"], downsample_padding=padding)
    twin.save_pretrained(tmp_path)
    x_t, t, context = draw(2, 4, 11, 14), np.array([3, 980]), draw(2, 7, 32, seed=1)
    with torch.no_grad():
        expected = twin(*map(torch.from_numpy, (x_t, t, context))).sample
    model, params = FlaxUNet2DConditionModel.from_pretrained(tmp_path)
    found = jax.jit(model.apply)({"params": params}, x_t, t, context).sample
    np.testing.assert_allclose(found, expected.numpy(), **CLOSE)


def test_keys_and_values_of_a_text_may_be_computed_once(tmp_path):
    make_unet().save_pretrained(tmp_path)
    model, params = FlaxUNet2DConditionModel.from_pretrained(tmp_path)
    x_t, t = jnp.asarray(draw(2, SIDE, SIDE, 4)), jnp.array([3, 980])
    context = jnp.asarray(draw(2, 7, 32, seed=1))
    text = project_context(params, context, jnp.float32)
    assert {leaf.shape for leaf in jax.tree.leaves(text)} == {(2, 7, 32), (2, 7, 64)}
    found = jax.jit(model.module.apply)({"params": params, TEXT: text}, x_t, t)
    expected = jax.jit(model.module.apply)({"params": params}, x_t, t, context)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"latent_channels": 3, "layers_per_block": 2, "scaling_factor": 0.5}])
def test_the_autoencoder_is_that_of_diffusers(tmp_path, changes):
    twin = make_autoencoder(**changes)
    twin.save_pretrained(tmp_path)
    images, latents = draw(2, 3, 32, 48), draw(2, twin.config.latent_channels, 8, 12, seed=1)
    with torch.no_grad():
        expected = twin.encode(torch.from_numpy(images)).latent_dist
        decoded = twin.decode(torch.from_numpy(latents)).sample
        there_and_back = twin(torch.from_numpy(images)).sample
    model, params = FlaxAutoencoderKL.from_pretrained(tmp_path)
    variables = {"params": params}
    found = jax.jit(model.encode)(variables, images).latent_dist
    np.testing.assert_allclose(np.moveaxis(found.mean, -1, 1), expected.mean.numpy(), **CLOSE)
    np.testing.assert_allclose(np.moveaxis(found.log_variance, -1, 1), expected.logvar.numpy(), **CLOSE)
    np.testing.assert_allclose(jax.jit(model.decode)(variables, latents).sample, decoded.numpy(), **CLOSE)
    # As old training scripts call it.
    encoded = model.apply(variables, images, deterministic=True, method=model.encode)
    np.testing.assert_allclose(encoded.latent_dist.mean, found.mean, **CLOSE)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images).sample, there_and_back.numpy(), **CLOSE)


def test_latents_are_drawn_with_the_variance_of_each():
    mean = jnp.full((1, 100, 100, 2), 3.0)
    log_variance = jnp.broadcast_to(jnp.log(jnp.array([4.0, 0.25])), mean.shape)
    drawn = LatentNormal(mean, log_variance).sample(jax.random.key(0))
    # 10,000 numbers a channel: the mean within 4 of its own deviations, the deviation within 3 %.
    np.testing.assert_allclose(drawn.mean((0, 1, 2)), 3.0, atol=4 * 2 / 100)
    np.testing.assert_allclose(drawn.std((0, 1, 2)), [2.0, 0.5], rtol=0.03)


@pytest.mark.parametrize("length", [48, 35])
def test_slices_of_the_queries_change_nothing(monkeypatch, length):
    query, key, value = map(jnp.asarray, (draw(2, length, 3, 8), draw(2, 33, 3, 8, seed=1), draw(2, 33, 3, 8, seed=2)))
    scores = np.einsum("blnd,bsnd->bnls", *map(np.asarray, (query, key)), dtype=np.float64) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bnls,bsnd->blnd", weights / weights.sum(-1, keepdims=True), np.asarray(value))
    monkeypatch.setattr(attention, "SLICE_BYTES", 4 * 33 * 10)
    np.testing.assert_allclose(attend(query, key, value), expected, rtol=0, atol=1e-6)

    def loss(*inputs):
        return jnp.sum(jnp.sin(attend(*inputs)))

    in_slices = jax.grad(loss, (0, 1, 2))(query, key, value)
    monkeypatch.setattr(attention, "SLICE_BYTES", 2**30)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        in_slices,
        jax.grad(loss, (0, 1, 2))(query, key, value),
    )


@pytest.mark.parametrize("slice_bytes", [2**22, 4 * 33 * 11])
def test_scores_of_narrow_numbers_are_those_that_diffusers_upcasts(monkeypatch, slice_bytes):
    """Of scores in the hundreds, bfloat16 has no digit behind the point."""
    spreads = {"query": 24, "key": 24, "value": 1}
    inputs = [torch.from_numpy(spread * draw(2, 33, 4, 24, seed=seed)) for seed, spread in enumerate(spreads.values())]
    query, key, value = (tensor.bfloat16().permute(0, 2, 1, 3).flatten(0, 1) for tensor in inputs)

    def theirs(upcast: bool) -> np.ndarray:
        twin = Attention(96, heads=4, dim_head=24, upcast_attention=upcast, upcast_softmax=True)
        weights = twin.get_attention_scores(query, key)
        return torch.bmm(weights.float(), value.float()).unflatten(0, (2, 4)).permute(0, 2, 1, 3).numpy()

    assert np.abs(theirs(False) - theirs(True)).max() > 0.1
    monkeypatch.setattr(attention, "SLICE_BYTES", slice_bytes)
    found = attend(*(jnp.asarray(tensor.numpy(), jnp.bfloat16) for tensor in inputs))
    # Weights and results have 8 bits.
    np.testing.assert_allclose(found.astype(jnp.float32), theirs(True), rtol=0, atol=0.02)


def test_cudnn_is_refused_with_the_reason():
    assert why_not_cudnn(jnp.bfloat16, (40, 80, 160), newest=True) is None
    assert "160" in (why_not_cudnn(jnp.bfloat16, (40, 80, 160), newest=False) or "")
    assert "float32" in (why_not_cudnn(jnp.float32, (64,), newest=True) or "")
    assert "20" in (why_not_cudnn(jnp.bfloat16, (20,), newest=True) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("features", [40, 64, 80, 160])
@pytest.mark.parametrize("keys", [256, 77])
def test_cudnn_gives_what_xla_gives(features, keys):
    query, key, value, weight = (
        jnp.asarray(draw(2, length, 8, features, seed=seed), jnp.bfloat16)
        for seed, length in enumerate((256, keys, keys, 256))
    )

    def loss(kernel, *inputs):
        return jnp.sum((attend(*inputs, kernel) * weight).astype(jnp.float32))

    for function in (attend, lambda *inputs: jax.grad(loss, (1, 2, 3))(inputs[-1], *inputs[:-1])):
        fused, plain = (jax.jit(function, static_argnums=3)(query, key, value, kernel) for kernel in ("cudnn", "xla"))
        # Both round to bfloat16, which keeps 8 bits, after sums of some hundred products.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0.02, atol=0.02
            ),
            fused,
            plain,
        )


@pytest.mark.slow
def test_the_full_size_networks_are_those_of_diffusers(tmp_path):
    torch.manual_seed(0)
    UNet2DConditionModel(sample_size=64, cross_attention_dim=768).save_pretrained(tmp_path / "unet")
    x_t, t, context = draw(1, 4, 64, 64), np.array([500]), draw(1, 77, 768, seed=1)
    twin = UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    with torch.no_grad():
        expected = twin(*map(torch.from_numpy, (x_t, t, context))).sample.numpy()
    del twin
    model, params = FlaxUNet2DConditionModel.from_pretrained(tmp_path / "unet")
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, x_t, t, context).sample, expected, atol=1e-4)
    del params
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    ).save_pretrained(tmp_path / "vae")
    twin = AutoencoderKL.from_pretrained(tmp_path / "vae").eval()
    images = draw(1, 3, 256, 256)
    with torch.no_grad():
        moments = twin.encode(torch.from_numpy(images)).latent_dist
        decoded = twin.decode(torch.from_numpy(x_t)).sample.numpy()
    model, params = FlaxAutoencoderKL.from_pretrained(tmp_path / "vae")
    found = jax.jit(model.encode)({"params": params}, images).latent_dist
    np.testing.assert_allclose(np.moveaxis(found.mean, -1, 1), moments.mean.numpy(), atol=1e-4)
    np.testing.assert_allclose(jax.jit(model.decode)({"params": params}, x_t).sample, decoded, atol=1e-4)
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB at the most")
