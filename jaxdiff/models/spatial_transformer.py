"""The transformer between the residual blocks of Stable Diffusion's UNet (arXiv 2112.10752, appendix E.2.1).

    (1)  x <- x + attn1(LN x)           between the pixels of the feature map
    (2)  x <- x + attn2(LN x, text)     from the pixels to the tokens of the text
    (3)  x <- x + ff(LN x),   ff(x) = W_2 (a * gelu(b)),   [a | b] = W_1 x        (GEGLU, arXiv 2002.05202)

The text is the same in every step of sampling, so its keys and values may be computed once, by `project_context`.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.attention import AttentionKernel, attend
from jaxdiff.models.convolution import Conv
from jaxdiff.models.normalization import GroupNorm
from jaxdiff.shapes import Images

Tokens = Float[Array, "B L D"]
Context = Float[Array, "B S E"]
"""One vector for each token of each text."""

TEXT = "text"
"""The collection of variables that holds keys and values of the text."""
TEXT_ATTENTION = "attn2"


def project_context(params: Mapping[str, Any], context: Context, dtype: DTypeLike) -> dict[str, Any]:
    """Return the keys and values that every attention of equation (2) has for these texts.

    Args:
      params: of a network that holds such attentions.
      context: the encoded texts.
      dtype: what the network computes in.

    Returns:
      The `TEXT` collection of the network's variables, laid out as its parameters are.
    """
    found = {}
    for name, node in params.items():
        if name == TEXT_ATTENTION:
            kernels = {"key": node["to_k"]["kernel"], "value": node["to_v"]["kernel"]}
            found[name] = {what: context.astype(dtype) @ kernel.astype(dtype) for what, kernel in kernels.items()}
        elif isinstance(node, Mapping) and (inside := project_context(node, context, dtype)):
            found[name] = inside
    return found


class CrossAttention(nn.Module):
    """Multi-head attention to the tokens themselves or to those of a text."""

    num_heads: int
    dtype: DTypeLike = jnp.float32
    kernel: AttentionKernel = "xla"

    @nn.compact
    def __call__(self, x: Tokens, context: Context | None = None) -> Tokens:
        """Return tokens of the same shape.

        Args:
          x: whence the queries come.
          context: whence keys and values come; None means from the `TEXT` collection, or else from x.
        """
        features = x.shape[-1]

        def project(name: str, tokens: Context) -> Tokens:
            return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)(tokens)

        query = project("to_q", x)
        if context is None and self.has_variable(TEXT, "key"):
            key: Tokens = self.get_variable(TEXT, "key")
            value: Tokens = self.get_variable(TEXT, "value")
        else:
            source = x if context is None else context
            key, value = project("to_k", source), project("to_v", source)

        def split(tokens: Tokens) -> Float[Array, "B L n d"]:
            return rearrange(tokens, "b l (n d) -> b l n d", n=self.num_heads)

        attended = rearrange(attend(split(query), split(key), split(value), self.kernel), "b l n d -> b l (n d)")
        return nn.Dense(features, dtype=self.dtype, name="to_out_0")(attended)


class FeedForward(nn.Module):
    """The second term of equation (3)."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        """Return tokens of the same shape."""
        features = x.shape[-1]
        hidden, gate = jnp.split(GatedProjection(8 * features, self.dtype, name="net_0")(x), 2, axis=-1)
        return nn.Dense(features, dtype=self.dtype, name="net_2")(hidden * jax.nn.gelu(gate, approximate=False))


class GatedProjection(nn.Module):
    """W_1 of equation (3), named as the published parameters are."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens) -> Float[Array, "B L F"]:
        """Return both halves."""
        return nn.Dense(self.features, dtype=self.dtype, name="proj")(x)


class TransformerBlock(nn.Module):
    """Equations (1) to (3)."""

    num_heads: int
    dtype: DTypeLike = jnp.float32
    kernel: AttentionKernel = "xla"

    @nn.compact
    def __call__(self, x: Tokens, context: Context | None) -> Tokens:
        """Return tokens of the same shape."""

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(1e-5, dtype=self.dtype, use_fast_variance=False, name=name)

        x = x + CrossAttention(self.num_heads, self.dtype, self.kernel, name="attn1")(norm("norm1")(x))
        text_attention = CrossAttention(self.num_heads, self.dtype, self.kernel, name=TEXT_ATTENTION)
        x = x + text_attention(norm("norm2")(x), context)
        return x + FeedForward(self.dtype, name="ff")(norm("norm3")(x))


class SpatialTransformer(nn.Module):
    """GroupNorm, a linear map, the transformer over all pixels, a linear map, and a residual connection.

    Attributes:
      linear: the maps have matrices for parameters, as in Stable Diffusion 2, not 1x1 convolutions.
    """

    num_heads: int
    norm_num_groups: int = 32
    linear: bool = False
    dtype: DTypeLike = jnp.float32
    kernel: AttentionKernel = "xla"

    @nn.compact
    def __call__(self, x: Images, context: Context | None = None) -> Images:
        """Return features of the same shape; None for `context` means that of the `TEXT` collection."""
        channels = x.shape[-1]

        def project(name: str):
            if self.linear:
                return nn.Dense(channels, dtype=self.dtype, name=name)
            return Conv(channels, kernel_size=1, padding=0, dtype=self.dtype, name=name)

        hidden = GroupNorm(self.norm_num_groups, epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        tokens = rearrange(project("proj_in")(hidden), "b h w c -> b (h w) c")
        tokens = TransformerBlock(self.num_heads, self.dtype, self.kernel, name="transformer_blocks_0")(tokens, context)
        return x + project("proj_out")(rearrange(tokens, "b (h w) c -> b h w c", h=x.shape[1]))
