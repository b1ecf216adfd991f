"""The smallest conditional model that has all the parts of a large one, shared by the tests of the recipes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.io.images import to_float
from jaxdiff.models.attention import AttentionBlock
from jaxdiff.models.classifier import Classifier, ClassifierConfig
from jaxdiff.models.convolution import Conv
from jaxdiff.models.embeddings import ConditionEmbedding, TimestepEmbedding, sinusoidal_embedding
from jaxdiff.models.resnet import ResnetBlock
from jaxdiff.models.unet import UNet, UNetConfig
from jaxdiff.recipes.conditional import ConditionalModel
from jaxdiff.recipes.judge import Judge

T = 50
SHAPE = (4, 4, 3)
CLASSES, DOMAINS = ("ant", "bee", "cow"), ("ink", "oil")


def tiny_unet(dtype=jnp.float32) -> UNet:
    config = UNetConfig(
        block_out_channels=(8,),
        attention=(True,),
        attention_head_dim=4,
        norm_num_groups=4,
        num_classes=len(CLASSES),
        num_domains=len(DOMAINS),
    )
    return UNet(config, dtype=dtype)


class TinyNetwork(nn.Module):
    """One block of every kind that a UNet has, with dropout: half the compile time where a gradient is compiled too."""

    @nn.compact
    def __call__(self, x_t, t, class_labels, domain_labels, train=False):
        embedding = TimestepEmbedding(8, name="time")(sinusoidal_embedding(t, 8))
        embedding += ConditionEmbedding(len(CLASSES), 8, name="class")(class_labels)
        embedding += ConditionEmbedding(len(DOMAINS), 8, name="domain")(domain_labels)
        hidden = Conv(8, name="conv_in")(x_t)
        hidden = ResnetBlock(8, norm_num_groups=4, dropout=0.3, name="resnet")(hidden, embedding, train)
        hidden = AttentionBlock(4, norm_num_groups=4, name="attention")(hidden)
        return Conv(x_t.shape[-1], name="conv_out")(hidden)


def tiny_model(network: nn.Module, prediction_type="v") -> ConditionalModel:
    return ConditionalModel(network, make_schedule("cosine", T), prediction_type, SHAPE, CLASSES, DOMAINS)


def random_params(init, *args, scale: float = 0.2):
    """Fill the tree that `init` would make: compiling initialisers takes longer than most tests, and no leaf is 0."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0), *args)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype), shapes)


def untrained_judge(images, num_classes: int, num_domains: int):
    """Return a judge that was never trained but gives several answers, and its answers as NumPy finds them.

    Logits of random weights differ little between images; without their mean over the images, the answers vary.
    """
    config = ClassifierConfig(num_classes, num_domains, channels=(16,))
    network = Classifier(config)
    params = random_params(network.init, jnp.zeros((1, *images.shape[1:])), scale=1.0)["params"]
    answers = []
    logits = network.apply({"params": params}, jnp.asarray(to_float(images)))
    for name, head in zip(("class_head", "domain_head"), logits):
        params[name]["bias"] -= head.mean(axis=0)
        answers.append(np.argmax(head - head.mean(axis=0, keepdims=True), axis=-1))
    assert all(len(np.unique(answer)) > 1 for answer in answers)
    return Judge(config, params), answers
