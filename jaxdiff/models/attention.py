"""Self-attention over the pixels of a feature map (arXiv 1706.03762, as placed by arXiv 2006.11239)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike

from jaxdiff.models.normalization import GroupNorm
from jaxdiff.shapes import Images


class AttentionBlock(nn.Module):
    """GroupNorm, multi-head attention over all pixels, and a residual connection.

    Attributes:
      head_dim: channels of one head; None means a single head.
    """

    head_dim: int | None = None
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

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

        attended = jax.nn.dot_product_attention(project("to_q"), project("to_k"), project("to_v"))
        attended = rearrange(attended, "b l n d -> b l (n d)")
        out = nn.Dense(channels, dtype=self.dtype, name="to_out_0")(attended)
        return x + rearrange(out, "b (h w) c -> b h w c", h=height, w=width)
