"""The judge's network: a small convolutional classifier with one head for the class and one for the domain."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.models.convolution import Conv
from jaxdiff.models.normalization import GroupNorm
from jaxdiff.shapes import Images


@dataclass(frozen=True)
class ClassifierConfig:
    """Numbers of outputs and widths; each width after the first halves height and width."""

    num_classes: int
    num_domains: int
    channels: tuple[int, ...] = (32, 64, 128)
    dropout: float = 0.3


class Classifier(nn.Module):
    """Convolutions, global mean and two linear heads."""

    config: ClassifierConfig

    @nn.compact
    def __call__(
        self, images: Images, train: bool = False
    ) -> tuple[Float[Array, "B classes"], Float[Array, "B domains"]]:
        """Return class logits and domain logits of images in [-1, 1]."""
        x = images
        for i, channels in enumerate(self.config.channels):
            for j, strides in enumerate((1 if i == 0 else 2, 1)):
                x = Conv(channels, strides=strides, name=f"conv_{i}_{j}")(x)
                x = GroupNorm(8, activation="silu", name=f"norm_{i}_{j}")(x)
        pooled = jnp.mean(x, axis=(1, 2))
        pooled = nn.Dropout(self.config.dropout, deterministic=not train)(pooled)
        return (
            nn.Dense(self.config.num_classes, name="class_head")(pooled),
            nn.Dense(self.config.num_domains, name="domain_head")(pooled),
        )
