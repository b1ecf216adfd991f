"""The smallest conditional model that has all the parts of a large one, shared by the tests of the recipes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.models.unet import UNet, UNetConfig
from jaxdiff.recipes.conditional import ConditionalModel

T = 50
SHAPE = (4, 4, 3)
CLASSES, DOMAINS = ("ant", "bee", "cow"), ("ink", "oil")


def tiny_unet(dropout: float = 0.0, dtype=jnp.float32) -> UNet:
    config = UNetConfig(
        block_out_channels=(8,),
        attention=(True,),
        attention_head_dim=4,
        norm_num_groups=4,
        dropout=dropout,
        num_classes=len(CLASSES),
        num_domains=len(DOMAINS),
    )
    return UNet(config, dtype=dtype)


def tiny_model(network: nn.Module, prediction_type="v") -> ConditionalModel:
    return ConditionalModel(network, make_schedule("cosine", T), prediction_type, SHAPE, CLASSES, DOMAINS)


def random_params(init, *args, scale: float = 0.2):
    """Fill the tree that `init` would make: compiling initialisers takes longer than most tests, and no leaf is 0."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0), *args)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype), shapes)
