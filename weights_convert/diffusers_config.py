"""The config.json of diffusers' pixel-space UNet in jaxdiff's words; what jaxdiff does not have is refused by name."""

from pathlib import Path
from typing import Any

from jaxdiff.errors import InputError
from jaxdiff.io.strict_json import decode, read_strict_json
from jaxdiff.models.unet import UNetConfig
from jaxdiff.recipes.diffusers_config import attention_levels, check_class, look_up, with_defaults

UNET_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
}
SAME_NAMES = (
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "attention_head_dim",
    "norm_num_groups",
    "norm_eps",
    "dropout",
    "flip_sin_to_cos",
    "freq_shift",
    "downsample_padding",
)
"""Those that `UNetConfig` has under the same name."""
UNET_FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
"""Keys of UNet2DModel with the one value that jaxdiff has, which is the default in diffusers too."""


def translate_unet(path: Path) -> tuple[UNetConfig, int]:
    """Return the layout, and the image size in pixels, of the config.json of a UNet2DModel.

    Raises:
      InputError: another class, or a key or value that jaxdiff does not have.
    """
    given = read_strict_json(path)
    check_class(path, given, ("UNet2DModel",))
    fields = with_defaults(path, given, UNET_DEFAULTS, UNET_FIXED)
    size = fields["sample_size"]
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if type(size) is not int:
        raise InputError(f"{path}: sample_size is {size!r}, not the height and width of square images")
    scale_shift = look_up(path, "resnet_time_scale_shift", fields, {"default": False, "scale_shift": True})
    # None means no norm in the middle's attention where the embedding scales and shifts; jaxdiff always has one.
    groups = (fields["norm_num_groups"],) if scale_shift else (None, fields["norm_num_groups"])
    if fields["attn_norm_num_groups"] not in groups:
        raise InputError(
            f"{path}: attn_norm_num_groups is {fields['attn_norm_num_groups']!r}; jaxdiff only has {groups[-1]!r} here"
        )
    kinds = ("DownBlock2D", "AttnDownBlock2D")
    attention = attention_levels(path, kinds, fields["down_block_types"], fields["up_block_types"])
    rest = {"attention": attention, "scale_shift": scale_shift, "patch_size": 1, "num_classes": 0, "num_domains": 0}
    try:
        return decode(UNetConfig, {name: fields[name] for name in SAME_NAMES} | rest), size
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
