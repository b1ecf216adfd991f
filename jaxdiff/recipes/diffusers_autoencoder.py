"""The config.json of diffusers' AutoencoderKL in jaxdiff's words, and back."""

from collections.abc import Mapping
from typing import Any

from jaxdiff.errors import InputError
from jaxdiff.models.autoencoder import AutoencoderConfig
from jaxdiff.recipes.diffusers_config import check_class, decode_config, with_defaults

AUTOENCODER: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "force_upcast": True,
}
"""Keys of AutoencoderKL, and of its Flax twin, that may vary, with diffusers' defaults."""
AUTOENCODER_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
IN_BOTH_AUTOENCODERS = (
    "in_channels",
    "out_channels",
    "latent_channels",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "sample_size",
    "scaling_factor",
    "force_upcast",
)


def translate_autoencoder(origin: str, values: Mapping[str, Any]) -> AutoencoderConfig:
    """Return the layout that the config.json of an AutoencoderKL, or of its Flax twin, describes.

    Raises:
      InputError: another class, or a key or value that jaxdiff does not have.
    """
    given = dict(values)
    check_class(origin, given, ("AutoencoderKL", "FlaxAutoencoderKL"))
    fields = with_defaults(origin, given, AUTOENCODER, AUTOENCODER_FIXED)
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        levels = fields["block_out_channels"]
        if isinstance(levels, list) and fields[name] != [kind] * len(levels):
            raise InputError(f"{origin}: {name} is {fields[name]!r}; jaxdiff only has {kind!r}, one a level")
    return decode_config(origin, AutoencoderConfig, {name: fields[name] for name in IN_BOTH_AUTOENCODERS})


def describe_autoencoder(config: AutoencoderConfig) -> dict[str, Any]:
    """Return the config.json that diffusers reads."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        **{name: getattr(config, name) for name in IN_BOTH_AUTOENCODERS},
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
