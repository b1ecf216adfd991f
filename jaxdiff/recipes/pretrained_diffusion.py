"""The published networks of latent diffusion under the names of diffusers' last Flax classes.

    from jaxdiff import FlaxAutoencoderKL, FlaxUNet2DConditionModel
    unet, params = FlaxUNet2DConditionModel.from_pretrained("runwayml/stable-diffusion-v1-5", subfolder="unet")

As in diffusers, `from_pretrained` gives the model and, apart from it, its parameters. Calls take images and latents
with channels second; inside jaxdiff, use `module`, which has them last.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxdiff.io.pretrained_files import CONFIG, DIFFUSERS
from jaxdiff.models.autoencoder import Autoencoder, AutoencoderConfig, LatentNormal
from jaxdiff.models.conditional_unet import ConditionalUNet, ConditionalUNetConfig
from jaxdiff.recipes.diffusers_autoencoder import describe_autoencoder, translate_autoencoder
from jaxdiff.recipes.diffusers_latent_unet import describe_latent_unet, translate_latent_unet
from jaxdiff.recipes.pretrained_model import FlaxPreTrainedModel


class FlaxUNet2DConditionOutput(NamedTuple):
    """The prediction, channels second."""

    sample: jax.Array


class FlaxAutoencoderKLOutput(NamedTuple):
    """The distribution of the latents, channels last, as in diffusers."""

    latent_dist: LatentNormal


class FlaxDecoderOutput(NamedTuple):
    """Pixels about in [-1, 1], channels second."""

    sample: jax.Array


class _DiffusionBase(FlaxPreTrainedModel):
    """Files and calls as in diffusers."""

    files = DIFFUSERS

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """Read a published model: as in `FlaxPreTrainedModel`, but always apart from its parameters."""
        return super().from_pretrained(*args, **{**options, "_do_init": False})


class FlaxUNet2DConditionModel(_DiffusionBase):
    """The latent UNet, conditioned on a text."""

    @classmethod
    def make_module(cls, config: ConditionalUNetConfig, dtype: DTypeLike) -> ConditionalUNet:
        """Return the linen module."""
        return ConditionalUNet(config, dtype)

    @classmethod
    def read_config(cls, values: Mapping[str, Any]) -> ConditionalUNetConfig:
        """Return the config that a config.json describes."""
        return translate_latent_unet(CONFIG, values)

    def config_dict(self) -> dict[str, Any]:
        """Return what config.json says of this model."""
        return describe_latent_unet(self.config)

    def example(self) -> dict[str, Any]:
        """Return the smallest input of the module."""
        side = 2 ** (len(self.config.block_out_channels) - 1)
        return {
            "x_t": jnp.zeros((1, side, side, self.config.in_channels)),
            "t": jnp.zeros(1, jnp.int32),
            "context": jnp.zeros((1, 1, self.config.cross_attention_dim)),
        }

    def apply(
        self,
        variables: Mapping[str, Any],
        sample: ArrayLike,
        timesteps: ArrayLike,
        encoder_hidden_states: ArrayLike,
        train: bool = False,
    ) -> FlaxUNet2DConditionOutput:
        """Predict; `sample` has channels second, and so has the prediction. `train` changes nothing: no dropout."""
        sample = jnp.transpose(jnp.asarray(sample), (0, 2, 3, 1))
        t = jnp.broadcast_to(jnp.asarray(timesteps), sample.shape[:1])
        predicted: Any = self.module.apply(dict(variables), sample, t, jnp.asarray(encoder_hidden_states))
        return FlaxUNet2DConditionOutput(jnp.transpose(predicted, (0, 3, 1, 2)))


class FlaxAutoencoderKL(_DiffusionBase):
    """The autoencoder between pixels and latents."""

    @classmethod
    def make_module(cls, config: AutoencoderConfig, dtype: DTypeLike) -> Autoencoder:
        """Return the linen module."""
        return Autoencoder(config, dtype)

    @classmethod
    def read_config(cls, values: Mapping[str, Any]) -> AutoencoderConfig:
        """Return the config that a config.json describes."""
        return translate_autoencoder(CONFIG, values)

    def config_dict(self) -> dict[str, Any]:
        """Return what config.json says of this model."""
        return describe_autoencoder(self.config)

    def example(self) -> dict[str, Any]:
        """Return the smallest input of the module."""
        side = self.config.size_divisor
        return {"images": jnp.zeros((1, side, side, self.config.in_channels))}

    def encode(self, variables: Mapping[str, Any], sample: ArrayLike) -> FlaxAutoencoderKLOutput:
        """Encode pixels in [-1, 1], channels second; the distribution has them last, as in diffusers."""
        images = jnp.transpose(jnp.asarray(sample), (0, 2, 3, 1))
        moments: Any = self.module.apply(dict(variables), images, method="encode")
        return FlaxAutoencoderKLOutput(moments)

    def apply(
        self,
        variables: Mapping[str, Any],
        sample: ArrayLike,
        deterministic: bool = True,
        method: Callable[..., Any] | None = None,
    ) -> Any:
        """Call `method`, which is `encode` or `decode`; None encodes pixels, takes the mean, and decodes it.

        `deterministic` changes nothing: there is no dropout.
        """
        if method is not None:
            return method(variables, sample)
        return self.decode(variables, self.encode(variables, sample).latent_dist.mean)

    def decode(self, variables: Mapping[str, Any], latents: ArrayLike) -> FlaxDecoderOutput:
        """Decode latents that are not scaled, channels second or, as diffusers also takes them, last."""
        latents = jnp.asarray(latents)
        if latents.shape[-1] != self.config.latent_channels:
            latents = jnp.transpose(latents, (0, 2, 3, 1))
        images: Any = self.module.apply(dict(variables), latents, method="decode")
        return FlaxDecoderOutput(jnp.transpose(images, (0, 3, 1, 2)))
