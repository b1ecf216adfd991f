"""The pixel-space diffusion UNet, conditioned on time and, where wanted, on a class and a domain.

Down levels push every output on a stack; up levels concatenate them back, newest first (arXiv 1505.04597,
2006.11239). The layout and the names of the parameters follow diffusers' `UNet2DModel`.
"""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike

from jaxdiff.models.attention import AttentionBlock
from jaxdiff.models.convolution import Conv
from jaxdiff.models.embeddings import ConditionEmbedding, TimestepEmbedding, sinusoidal_embedding
from jaxdiff.models.levels import DownBlock, MidBlock, UpBlock
from jaxdiff.models.normalization import GroupNorm
from jaxdiff.models.resnet import Downsample, ResnetBlock, Upsample
from jaxdiff.shapes import Images, Labels, Timesteps


@dataclass(frozen=True)
class UNetConfig:
    """Everything that decides the shapes of the parameters.

    Attributes:
      block_out_channels: channels of each level, from full resolution down; each level halves the one before.
      layers_per_block: residual blocks of a down level; an up level has one more.
      attention: whether each level has attention after its residual blocks.
      attention_head_dim: channels of one attention head; None means a single head.
      downsample_padding: zeros around the features before a strided convolution; 0 adds them at the bottom and the
        right alone, as DDPM does.
      patch_size: pixels on a side that are folded into channels before the first convolution and back after the
        last (arXiv 2301.11093, section 3.3); 1 for none.
      scale_shift: how the embedding enters a residual block, see `ResnetBlock`.
      num_classes: class labels 0..num_classes-1, and num_classes for "none"; 0 means no class condition.
      num_domains: the same for the data set that an image looks like.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64, 128, 128)
    layers_per_block: int = 1
    attention: tuple[bool, ...] = (False, False, True)
    attention_head_dim: int | None = 32
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    dropout: float = 0.0
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    downsample_padding: int = 1
    patch_size: int = 1
    scale_shift: bool = False
    num_classes: int = 0
    num_domains: int = 0

    def __post_init__(self):
        if len(self.attention) != len(self.block_out_channels):
            raise ValueError(
                f"attention needs one entry a level: {len(self.attention)} given, {len(self.block_out_channels)} levels"
            )
        counts = (self.in_channels, self.out_channels, self.layers_per_block, self.norm_num_groups, self.patch_size)
        heads = 1 if self.attention_head_dim is None else self.attention_head_dim
        if not self.block_out_channels or min(*counts, *self.block_out_channels, heads) < 1:
            raise ValueError("levels, channels, layers, groups and patches must all number at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if not self.freq_shift < self.block_out_channels[0] // 2:
            raise ValueError(f"freq_shift {self.freq_shift} is too large for {self.block_out_channels[0]} channels")
        if self.downsample_padding not in (0, 1):
            raise ValueError(f"downsample_padding must be 0 or 1, got {self.downsample_padding}")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"{channels} channels do not split into {self.norm_num_groups} groups")
            if channels % (self.attention_head_dim or channels):
                raise ValueError(f"{channels} channels do not split into heads of {self.attention_head_dim}")

    @property
    def size_divisor(self) -> int:
        """Height and width must be multiples of this, so that skips meet features of their own size."""
        return self.patch_size * 2 ** (len(self.block_out_channels) - 1)


PRESETS: dict[str, dict] = {
    "tiny": {
        "block_out_channels": (64, 128),
        "layers_per_block": 1,
        "attention": (False, True),
        "norm_num_groups": 8,
        "patch_size": 2,
        "scale_shift": True,
    },
    "small": {"block_out_channels": (64, 128, 128), "layers_per_block": 1, "norm_num_groups": 32},
    "base": {
        "block_out_channels": (128, 256, 256),
        "layers_per_block": 2,
        "attention": (False, True, True),
        "attention_head_dim": 64,
        "dropout": 0.1,
    },
}
"""Fields of `UNetConfig` by the name that `--preset` takes."""

_DDPM = {
    "layers_per_block": 2,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "flip_sin_to_cos": False,
    "freq_shift": 1.0,
    "downsample_padding": 0,
}
_DDPM_256 = {
    **_DDPM,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "attention": (False, False, False, False, True, False),
}
PRETRAINED: dict[str, dict] = {
    "ddpm-cifar10-32": {
        **_DDPM,
        "block_out_channels": (128, 256, 256, 256),
        "attention": (False, True, False, False),
    },
    "ddpm-celebahq-256": _DDPM_256,
    "ddpm-church-256": _DDPM_256,
    "ddpm-bedroom-256": _DDPM_256,
    "course-face": {**_DDPM_256, "norm_eps": 1e-5, "freq_shift": 0.0, "downsample_padding": 1},
}
"""Fields of `UNetConfig` by the name of published weights; the number in a name is the image size, else it is 256."""


class UNet(nn.Module):
    """Predict noise, clean image or velocity from a noisy image, its timestep and its conditions."""

    config: UNetConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Lay out the levels; names give the parameter tree of diffusers' UNet2DModel."""
        cfg, top = self.config, self.config.block_out_channels[0]
        self.conv_in = Conv(top, dtype=self.dtype)
        self.time_embedding = TimestepEmbedding(4 * top, dtype=self.dtype)
        if cfg.num_classes:
            self.class_embedding = ConditionEmbedding(cfg.num_classes, 4 * top, dtype=self.dtype)
        if cfg.num_domains:
            self.domain_embedding = ConditionEmbedding(cfg.num_domains, 4 * top, dtype=self.dtype)
        levels = list(zip(cfg.block_out_channels, map(self._make_resnet, cfg.block_out_channels), cfg.attention))
        attention = partial(AttentionBlock, cfg.attention_head_dim, cfg.norm_num_groups, cfg.norm_eps, dtype=self.dtype)
        self.down_blocks = [
            DownBlock(
                cfg.layers_per_block,
                resnet,
                attention if attends else None,
                partial(Downsample, channels, cfg.downsample_padding, self.dtype) if i < len(levels) - 1 else None,
            )
            for i, (channels, resnet, attends) in enumerate(levels)
        ]
        self.mid_block = MidBlock(levels[-1][1], attention)
        self.up_blocks = [
            UpBlock(
                cfg.layers_per_block + 1,
                resnet,
                attention if attends else None,
                partial(Upsample, channels, self.dtype) if i < len(levels) - 1 else None,
            )
            for i, (channels, resnet, attends) in enumerate(reversed(levels))
        ]
        self.conv_norm_out = GroupNorm(cfg.norm_num_groups, epsilon=cfg.norm_eps, activation="silu", dtype=self.dtype)
        self.conv_out = Conv(cfg.out_channels * cfg.patch_size**2, dtype=self.dtype, kernel_init=nn.initializers.zeros)

    def _make_resnet(self, channels: int) -> partial:
        """Return what makes the residual blocks of a level."""
        cfg = self.config
        return partial(
            ResnetBlock, channels, cfg.norm_num_groups, cfg.norm_eps, cfg.dropout, cfg.scale_shift, dtype=self.dtype
        )

    def __call__(
        self,
        x_t: Images,
        t: Timesteps,
        class_labels: Labels | None = None,
        domain_labels: Labels | None = None,
        train: bool = False,
    ) -> Images:
        """Return the prediction in float32, of the images' shape.

        Args:
          x_t: noisy images.
          t: timestep of each image, 0..T-1.
          class_labels: needed if and only if the config has classes; `num_classes` is the null token.
          domain_labels: the same for domains.
          train: apply dropout (needs the "dropout" random stream).
        """
        patch = self.config.patch_size
        x = rearrange(x_t.astype(self.dtype), "b (h p) (w q) c -> b h w (p q c)", p=patch, q=patch)
        x = self.conv_in(x)
        embedding = self._embed(t, class_labels, domain_labels)
        skips = [x]
        for block in self.down_blocks:
            x, pushed = block(x, embedding, train)
            skips.extend(pushed)
        x = self.mid_block(x, embedding, train)
        for up_block in self.up_blocks:
            split = len(skips) - self.config.layers_per_block - 1
            x = up_block(x, skips[split:], embedding, train)
            skips = skips[:split]
        x = self.conv_out(self.conv_norm_out(x)).astype(jnp.float32)
        return rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=patch, q=patch)

    def _embed(self, t: Timesteps, class_labels: Labels | None, domain_labels: Labels | None):
        """Sum the embeddings of time and of every condition that the config has."""
        cfg = self.config
        waves = sinusoidal_embedding(t, cfg.block_out_channels[0], cfg.flip_sin_to_cos, cfg.freq_shift)
        embedding = self.time_embedding(waves)
        for name, num_values, labels in (
            ("class", cfg.num_classes, class_labels),
            ("domain", cfg.num_domains, domain_labels),
        ):
            if bool(num_values) != (labels is not None):
                raise ValueError(f"{name}_labels are needed if and only if the config has num_{name} values")
            if labels is not None:
                embedding = embedding + getattr(self, f"{name}_embedding")(labels)
        return embedding
