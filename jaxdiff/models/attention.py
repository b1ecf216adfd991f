"""Attention over the pixels of a feature map, or from them to a text (arXiv 1706.03762).

    (1)  attend: softmax(q k^T / sqrt(d)) v in each head of d features

On a CPU the scores of many queries leave the processor's cache, so equation (1) runs head by head on slices of the
queries; on a GPU it may be cuDNN's fused kernel, which never writes the scores at all.
"""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.normalization import GroupNorm
from jaxdiff.shapes import Images

AttentionKernel = Literal["xla", "cudnn"]
"""What computes equation (1)."""
SLICE_BYTES = 2**22
"""Most memory that the scores of one slice of queries take on a CPU."""
CUDNN_HEAD_MULTIPLE, CUDNN_HEAD_MOST = 8, 128
"""What cuDNN's kernel asks of the features of a head; newer GPUs take 256."""


def why_not_cudnn(dtype: DTypeLike, head_dims: Sequence[int], newest: bool) -> str | None:
    """Return what forbids cuDNN's kernel, or None if nothing does that is known beforehand.

    Args:
      dtype: what the network computes in.
      head_dims: features of the heads of all its attention blocks.
      newest: whether the GPU has compute capability 9.0 (Hopper) or more.
    """
    most = 256 if newest else CUDNN_HEAD_MOST
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not in {jnp.dtype(dtype).name}"
    if odd := [dim for dim in head_dims if dim % CUDNN_HEAD_MULTIPLE or dim > most]:
        return f"a head has {odd[0]} features, which must be a multiple of {CUDNN_HEAD_MULTIPLE} and at most {most}"
    return None


def attend(
    query: Float[Array, "B L n d"],
    key: Float[Array, "B S n d"],
    value: Float[Array, "B S n d"],
    kernel: AttentionKernel = "xla",
) -> Float[Array, "B L n d"]:
    """Return equation (1) for every head; scores and softmax are float32 whatever the inputs."""
    batch, length, heads, _ = query.shape
    if kernel == "cudnn" and key.shape[1] % 2:
        # An odd number of keys, such as the 77 tokens of a text: cuDNN's gradient of that has not been tried on a GPU.
        kernel = "xla"
    row_bytes = 4 * key.shape[1]
    small = batch * heads * length * row_bytes <= SLICE_BYTES
    if kernel == "cudnn" or small or jax.default_backend() != "cpu":
        return jax.nn.dot_product_attention(query, key, value, implementation=kernel)
    return _attend_in_slices(query, key, value, _slice_length(length, SLICE_BYTES // row_bytes))


def _slice_length(length: int, most: int) -> int:
    """Return the largest divisor of `length` up to `most`."""
    return max(size for size in range(1, max(1, min(length, most)) + 1) if length % size == 0)


def _attend_in_slices(query, key, value, size: int) -> Float[Array, "B L n d"]:
    """Return equation (1), `size` queries of one head at a time."""
    batch, _, heads, features = query.shape
    scale = np.float32(features**-0.5)

    def of_head(inputs):
        query, key, value = inputs

        # Gradients compute the scores once more, instead of keeping those of all slices.
        @jax.checkpoint
        def of_slice(query):
            # Scaled queries would be rounded where they are narrower than the scores.
            scores = scale * jnp.matmul(query, key.T, preferred_element_type=jnp.float32)
            weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
            total = jnp.sum(weights, axis=-1, keepdims=True)
            out = jnp.matmul(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
            return (out / total).astype(value.dtype)

        return jax.lax.map(of_slice, query.reshape(-1, size, features)).reshape(query.shape)

    by_head = [rearrange(x, "b l n d -> (b n) l d") for x in (query, key, value)]
    return rearrange(jax.lax.map(of_head, tuple(by_head)), "(b n) l d -> b l n d", b=batch, n=heads)


class AttentionBlock(nn.Module):
    """GroupNorm, multi-head attention over all pixels, and a residual connection (as placed by arXiv 2006.11239).

    Attributes:
      head_dim: channels of one head; None means a single head.
      names: of the maps to queries, keys and values and of the one back.
    """

    head_dim: int | None = None
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    dtype: DTypeLike = jnp.float32
    names: tuple[str, str, str, str] = ("to_q", "to_k", "to_v", "to_out_0")

    @nn.compact
    def __call__(self, x: Images) -> Images:
        """Return features of the same shape."""
        height, width, channels = x.shape[1:]
        num_heads = channels // (self.head_dim or channels)
        norm = GroupNorm(self.norm_num_groups, epsilon=self.norm_eps, dtype=self.dtype, name="group_norm")
        tokens = rearrange(norm(x), "b h w c -> b (h w) c")

        def project(name: str) -> jax.Array:
            projected = nn.Dense(channels, dtype=self.dtype, name=name)(tokens)
            return rearrange(projected, "b l (n d) -> b l n d", n=num_heads)

        query, key, value, out = self.names
        attended = rearrange(attend(project(query), project(key), project(value)), "b l n d -> b l (n d)")
        return x + rearrange(
            nn.Dense(channels, dtype=self.dtype, name=out)(attended), "b (h w) c -> b h w c", h=height, w=width
        )
