"""The transformer encoder of CLIP (arXiv 2103.00020): layers of attention and feed-forward, normalized before each.

(1)  x <- x + out_proj(attend(LN_1 x)),   x <- x + fc2(act(fc1(LN_2 x)))
(2)  attend: softmax(q k^T / sqrt(d) + mask) v in each head of d features                       (arXiv 1706.03762)
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxdiff.models.clip_config import CLIPTextConfig, CLIPVisionConfig

Tokens = Float[Array, "B L D"]
Mask = Bool[Array, "#B 1 L L"]
"""True where a token (third axis) may look at another (fourth axis)."""


def quick_gelu(x: Tokens) -> Tokens:
    """Return x sigmoid(1.702 x), OpenAI's approximation of GELU (arXiv 1606.08415, section 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATION_FUNCTIONS: dict[str, Callable[[Tokens], Tokens]] = {
    "quick_gelu": quick_gelu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


class Encoder(nn.Module):
    """All layers, equation (1); the parameters lie below `layers`, by number."""

    config: CLIPTextConfig | CLIPVisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens, mask: Mask | None = None) -> tuple[Tokens, ...]:
        """Return the input and the output of every layer, the last one last."""
        return Layers(self.config, self.dtype, name="layers")(x, mask)


class Layers(nn.Module):
    """The numbered layers."""

    config: CLIPTextConfig | CLIPVisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens, mask: Mask | None) -> tuple[Tokens, ...]:
        """Return the input and the output of every layer."""
        states = [x]
        for number in range(self.config.num_hidden_layers):
            states.append(EncoderLayer(self.config, self.dtype, name=str(number))(states[-1], mask))
        return tuple(states)


class EncoderLayer(nn.Module):
    """Equation (1)."""

    config: CLIPTextConfig | CLIPVisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens, mask: Mask | None) -> Tokens:
        """Return tokens of the same shape."""
        attention = Attention(self.config.num_attention_heads, self.dtype, name="self_attn")
        x = x + attention(layer_norm(self.config, self.dtype, "layer_norm1")(x), mask)
        mlp = Mlp(self.config.intermediate_size, self.config.hidden_act, self.dtype, name="mlp")
        return x + mlp(layer_norm(self.config, self.dtype, "layer_norm2")(x))


class Attention(nn.Module):
    """Multi-head self-attention, equation (2)."""

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens, mask: Mask | None) -> Tokens:
        """Return tokens of the same shape."""
        features = x.shape[-1]

        def project(name: str) -> Float[Array, "B L heads d"]:
            projected = nn.Dense(features, dtype=self.dtype, name=name)(x)
            return projected.reshape(*x.shape[:2], self.num_heads, -1)

        attended = jax.nn.dot_product_attention(project("q_proj"), project("k_proj"), project("v_proj"), mask=mask)
        return nn.Dense(features, dtype=self.dtype, name="out_proj")(attended.reshape(x.shape))


class Mlp(nn.Module):
    """Two dense layers with the activation between them."""

    features: int
    activation: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        """Return tokens of the same shape."""
        hidden = ACTIVATION_FUNCTIONS[self.activation](nn.Dense(self.features, dtype=self.dtype, name="fc1")(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(hidden)


def layer_norm(config: CLIPTextConfig | CLIPVisionConfig, dtype: DTypeLike, name: str | None = None) -> nn.LayerNorm:
    """Make a layer normalization (arXiv 1607.06450); its statistics are float32 whatever the dtype."""
    return nn.LayerNorm(config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name)
