"""A class- and domain-conditional diffusion model as one value: network, schedule, names, and its null tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdiff.diffusion.prediction import PredictionType
from jaxdiff.diffusion.schedule import NoiseSchedule, check_prediction_type, make_schedule
from jaxdiff.errors import InputError
from jaxdiff.models.unet import PRESETS, UNet, UNetConfig
from jaxdiff.settings import DiffusionSettings
from jaxdiff.shapes import Images, Labels, Timesteps


class Condition(NamedTuple):
    """What an image should show, and which data set it should look like."""

    class_labels: Labels
    domain_labels: Labels


@dataclass(frozen=True)
class ConditionalModel:
    """What training and sampling need to know beside the parameters."""

    network: nn.Module
    schedule: NoiseSchedule
    prediction_type: PredictionType
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...]

    @property
    def null(self) -> tuple[int, int]:
        """The tokens that mean "no class" and "no domain"."""
        return len(self.class_names), len(self.domain_names)

    def apply(self, params: Any, x_t: Images, t: Timesteps, condition: Condition, **options: Any) -> Images:
        """Run the network; options are `train` and `rngs`, as linen takes them."""
        return jnp.asarray(self.network.apply({"params": params}, x_t, t, *condition, **options))

    def init(self, key: jax.Array) -> dict:
        """Return fresh parameters."""
        zero = jnp.zeros((1,), jnp.int32)
        return self.network.init(key, jnp.zeros((1, *self.image_shape)), zero, zero, zero)["params"]

    def compile_init(self) -> Callable[[jax.Array], dict]:
        """Return `init` as one program, not optimised: it runs once, and optimising takes several times as long."""
        return jax.jit(self.init).lower(jax.random.key(0)).compile({"xla_backend_optimization_level": "0"})


def build_conditional_model(
    preset: str,
    dtype: str,
    diffusion: DiffusionSettings,
    image_shape: tuple[int, int, int],
    class_names: tuple[str, ...],
    domain_names: tuple[str, ...],
) -> ConditionalModel:
    """Return the model of a preset for images of one shape.

    Raises:
      InputError: the image size does not halve as often as the preset needs.
    """
    config = UNetConfig(
        **PRESETS[preset],
        in_channels=image_shape[-1],
        out_channels=image_shape[-1],
        num_classes=len(class_names),
        num_domains=len(domain_names),
    )
    height, width, _ = image_shape
    if height % config.size_divisor or width % config.size_divisor:
        raise InputError(
            f"images of {height}x{width} pixels do not fit --preset {preset}, which needs multiples of "
            f"{config.size_divisor}: resize them with --image-size"
        )
    schedule = make_schedule(
        diffusion.schedule, diffusion.num_train_timesteps, zero_terminal_snr=diffusion.zero_terminal_snr
    )
    check_prediction_type(schedule, diffusion.prediction_type)
    network = UNet(config, dtype=jnp.dtype(dtype))
    return ConditionalModel(network, schedule, diffusion.prediction_type, image_shape, class_names, domain_names)
