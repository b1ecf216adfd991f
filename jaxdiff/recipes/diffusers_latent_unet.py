"""The config.json of diffusers' UNet2DConditionModel in jaxdiff's words, and back."""

import re
from collections.abc import Mapping
from typing import Any

from jaxdiff.models.conditional_unet import ConditionalUNetConfig
from jaxdiff.recipes.diffusers_config import attention_levels, check_class, decode_config, with_defaults

LATENT_UNET: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "upcast_attention": False,
    "split_head_dim": False,
    "use_memory_efficient_attention": False,
}
"""Keys of UNet2DConditionModel, and of its Flax twin, that may vary, with diffusers' defaults.

The last two, which only the twin has, say how it computed the same numbers: they are not kept.
"""
LATENT_UNET_FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}
IN_BOTH_UNETS = (
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "use_linear_projection",
    "norm_num_groups",
    "norm_eps",
    "dropout",
    "flip_sin_to_cos",
    "freq_shift",
    "downsample_padding",
    "upcast_attention",
)
"""Those that `ConditionalUNetConfig` has under the same name."""


def translate_latent_unet(origin: str, values: Mapping[str, Any]) -> ConditionalUNetConfig:
    """Return the layout that the config.json of a UNet2DConditionModel, or of its Flax twin, describes.

    Raises:
      InputError: another class, or a key or value that jaxdiff does not have.
    """
    given = dict(values)
    version = str(given.get("_diffusers_version", ""))
    check_class(origin, given, ("UNet2DConditionModel", "FlaxUNet2DConditionModel"))
    fields = with_defaults(origin, given, LATENT_UNET, LATENT_UNET_FIXED)
    levels = fields["block_out_channels"]
    # diffusers' attention_head_dim has always been the number of heads.
    heads = fields["attention_head_dim"]
    if isinstance(levels, list) and not isinstance(heads, list):
        heads = [heads] * len(levels)
    kinds = ("DownBlock2D", "CrossAttnDownBlock2D")
    attention = attention_levels(origin, kinds, fields["down_block_types"], fields["up_block_types"])
    rest = {"num_attention_heads": heads, "attention": attention}
    if fields["upcast_attention"] is None:  # as some converters wrote it
        fields["upcast_attention"] = False
    size = fields["sample_size"]
    if size is not None:
        # Fine-tunes of Stable Diffusion 1 from before diffusers 0.9 may say 32, but diffusers draws them at 64.
        old = re.match(r"0\.[0-8](\.|$)", version) and isinstance(size, int)
        rest["sample_size"] = max(size, 64) if old else size
    return decode_config(origin, ConditionalUNetConfig, {name: fields[name] for name in IN_BOTH_UNETS} | rest)


def describe_latent_unet(config: ConditionalUNetConfig) -> dict[str, Any]:
    """Return the config.json that diffusers reads."""
    kinds = [("CrossAttn" if attends else "", attends) for attends in config.attention]
    return {
        "_class_name": "UNet2DConditionModel",
        **{name: getattr(config, name) for name in IN_BOTH_UNETS},
        "sample_size": config.sample_size,
        "attention_head_dim": list(config.num_attention_heads),
        "down_block_types": [f"{kind}DownBlock2D" for kind, _ in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind, _ in reversed(kinds)],
    }
