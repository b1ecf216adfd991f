"""The config files of diffusers in jaxdiff's words; what jaxdiff does not have is refused by name.

A key that a file lacks means the default of the class that the file names, as in diffusers; a key that only another of
the known classes has is left aside, as in diffusers too.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxdiff.errors import InputError
from jaxdiff.io.strict_json import decode, read_strict_json
from jaxdiff.models.autoencoder import AutoencoderConfig
from jaxdiff.models.conditional_unet import ConditionalUNetConfig
from jaxdiff.recipes.pretrained_unet import ForwardProcess, SamplingDefaults
from jaxdiff.settings import SamplerName

_BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
_STEPS = {"prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {**_BETAS, **_STEPS, "timestep_spacing": "linspace", "use_karras_sigmas": False}
_CLIPS = {"clip_sample": True, "clip_sample_range": 1.0}
_TERMINAL = {"rescale_betas_zero_snr": False}
SCHEDULERS: dict[str, tuple[SamplerName, dict[str, Any]]] = {
    "DDPMScheduler": ("ddpm", {**_BETAS, **_STEPS, **_CLIPS, **_TERMINAL}),
    "DDIMScheduler": ("ddim", {**_BETAS, **_STEPS, **_CLIPS, **_TERMINAL, "set_alpha_to_one": True}),
    "PNDMScheduler": ("pndm", {**_BETAS, **_STEPS, "set_alpha_to_one": False}),
    "EulerDiscreteScheduler": ("euler", {**_LINSPACE, **_TERMINAL}),
    "HeunDiscreteScheduler": (
        "heun",
        {**_LINSPACE, "beta_start": 0.00085, "beta_end": 0.012, **_CLIPS, "clip_sample": False},
    ),
    "DPMSolverMultistepScheduler": ("dpm++2m", {**_LINSPACE, **_TERMINAL, "algorithm_type": "dpmsolver++"}),
    "UniPCMultistepScheduler": ("unipc", {**_LINSPACE, **_TERMINAL}),
}
"""By class: the sampler that it is, and the defaults of the keys that may vary."""
FIXED: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "thresholding": (False,),
    "timestep_values": (None,),
    "predict_epsilon": (True,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_dynamic_shifting": (False,),
    "final_sigmas_type": ("zero",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "shift_terminal": (None,),
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh2"),
    "lower_order_final": (True,),
    "euler_at_final": (False,),
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
    # Keys that choose between ways of one sampler: the choice is the user's when sampling.
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", None),
    "skip_prk_steps": (False, True),
    "tensor_format": ("pt", "np"),
}
"""Keys with the few values that jaxdiff has, of any class."""
WITHOUT_EFFECT = {
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "flow_shift",
    "time_shift_type",
    "lambda_min_clipped",
}
"""Keys that mean nothing where the keys above have those values."""

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTION_TYPES = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
SPACINGS = {name: name for name in ("leading", "trailing", "linspace")}


def translate_scheduler(path: Path) -> tuple[ForwardProcess, SamplingDefaults, SamplerName]:
    """Return what a scheduler_config.json says of training and of sampling, and its sampler.

    Raises:
      InputError: another class, or a key or value that jaxdiff does not have.
    """
    given = read_strict_json(path)
    kind = check_class(path, given, SCHEDULERS)
    sampler, defaults = SCHEDULERS[kind]
    for name, values in FIXED.items():
        if name in given and not any(given[name] == value for value in values):
            raise InputError(f"{path}: {name} is {given[name]!r}; jaxdiff only has {', '.join(map(repr, values))}")
    everywhere = {*FIXED, *WITHOUT_EFFECT, *(name for _, other in SCHEDULERS.values() for name in other)}
    own = {name: value for name, value in given.items() if name in defaults or name not in everywhere}
    fields = {
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "rescale_betas_zero_snr": False,
        "set_alpha_to_one": True,
        "use_karras_sigmas": False,
        "algorithm_type": "dpmsolver++",
    }
    fields |= with_defaults(path, own, defaults, {})
    if fields["clip_sample"] and fields["clip_sample_range"] != 1:
        raise InputError(f"{path}: clip_sample_range is {fields['clip_sample_range']!r}; jaxdiff only has 1")
    kinds = {"dpmsolver++": sampler, "sde-dpmsolver++": "dpm++2m-sde"}
    diffusion = {
        "schedule": look_up(path, "beta_schedule", fields, SCHEDULES),
        "num_train_timesteps": fields["num_train_timesteps"],
        "beta_start": fields["beta_start"],
        "beta_end": fields["beta_end"],
        "prediction_type": look_up(path, "prediction_type", fields, PREDICTION_TYPES),
        "zero_terminal_snr": fields["rescale_betas_zero_snr"],
    }
    spacing = look_up(path, "timestep_spacing", fields, SPACINGS)
    try:
        ends_clean, karras = (decode(bool, fields[name], name) for name in ("set_alpha_to_one", "use_karras_sigmas"))
        sampling = {
            "spacing": "karras" if karras else spacing,
            "steps_offset": fields["steps_offset"],
            "final": -1 if ends_clean else 0,
            "clip": fields["clip_sample"],
        }
        return (
            decode(ForwardProcess, diffusion),
            decode(SamplingDefaults, sampling),
            look_up(path, "algorithm_type", fields, kinds),
        )
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


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
"""Keys of UNet2DConditionModel, and of its Flax twin, that may vary, with diffusers' defaults."""
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
)
"""Those that `ConditionalUNetConfig` has under the same name."""
IN_BOTH_AUTOENCODERS = (
    "in_channels",
    "out_channels",
    "latent_channels",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "sample_size",
    "scaling_factor",
)


def translate_latent_unet(origin: str, values: Mapping[str, Any]) -> ConditionalUNetConfig:
    """Return the layout that the config.json of a UNet2DConditionModel, or of its Flax twin, describes.

    Raises:
      InputError: another class, or a key or value that jaxdiff does not have.
    """
    given = dict(values)
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
    size = fields["sample_size"]
    if size is not None:
        rest["sample_size"] = size
    return _decode(origin, ConditionalUNetConfig, {name: fields[name] for name in IN_BOTH_UNETS} | rest)


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
    return _decode(origin, AutoencoderConfig, {name: fields[name] for name in IN_BOTH_AUTOENCODERS})


def describe_autoencoder(config: AutoencoderConfig) -> dict[str, Any]:
    """Return the config.json that diffusers reads."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        **{name: getattr(config, name) for name in IN_BOTH_AUTOENCODERS},
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _decode(origin: str, kind: Any, values: Mapping[str, Any]) -> Any:
    """Return the config of these values, each of the type of its field."""
    try:
        return decode(kind, values)
    except ValueError as error:
        raise InputError(f"{origin}: {error}") from error


def check_class(origin: Path | str, given: dict[str, Any], known: Collection[str]) -> str:
    """Take the entries that every config has out of it, and return its class."""
    kind = given.pop("_class_name", None)
    for name in ("_diffusers_version", "_name_or_path", "_use_default_values"):
        given.pop(name, None)
    if kind not in known:
        raise InputError(f"{origin}: _class_name is {kind!r}; jaxdiff only has {', '.join(known)}")
    return kind


def with_defaults(
    origin: Path | str, given: dict[str, Any], defaults: Mapping[str, Any], fixed: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields that may vary, having checked that the others are as jaxdiff has them."""
    if unknown := sorted(given.keys() - defaults.keys() - fixed.keys()):
        raise InputError(f"{origin}: {unknown[0]} is {given[unknown[0]]!r}, but jaxdiff does not know this key")
    for name, only in fixed.items():
        if given.get(name, only) != only:
            raise InputError(f"{origin}: {name} is {given[name]!r}; jaxdiff only has {only!r}")
    return {name: given.get(name, default) for name, default in defaults.items()}


def look_up(origin: Path | str, name: str, fields: dict[str, Any], table: Mapping[str, Any]) -> Any:
    """Translate one value of few."""
    value = fields[name]
    if not isinstance(value, str) or value not in table:
        raise InputError(f"{origin}: {name} is {value!r}; jaxdiff only has {', '.join(map(repr, table))}")
    return table[value]


def attention_levels(origin: Path | str, kinds: tuple[str, str], down: Any, up: Any) -> list[bool]:
    """Return whether each level attends, having checked that the way up mirrors the way down.

    Args:
      origin: what error messages begin with.
      kinds: of down blocks without and with attention.
      down: what the config says of the levels on the way down.
      up: the same of the way up.
    """
    for kind in down if isinstance(down, list) else [down]:
        if not isinstance(kind, str) or kind not in kinds:
            raise InputError(f"{origin}: down_block_types has {kind!r}; jaxdiff only has {', '.join(kinds)}")
    if up != [kind.replace("Down", "Up") for kind in reversed(down)]:
        raise InputError(f"{origin}: up_block_types is {up!r}, which does not mirror down_block_types, as in jaxdiff")
    return [kind == kinds[1] for kind in down]
