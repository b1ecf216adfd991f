"""The config files of diffusers in jaxdiff's words; what jaxdiff does not have is refused by name.

A key that a file lacks means the default of the class that the file names, as in diffusers.
"""

from pathlib import Path
from typing import Any

from jaxdiff.errors import InputError
from jaxdiff.io.strict_json import decode, read_strict_json
from jaxdiff.models.unet import UNetConfig
from jaxdiff.recipes.pretrained_unet import ForwardProcess, SamplingDefaults

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

_BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
_STEPS = {"prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 0}
_CLIPS = {"clip_sample": True, "clip_sample_range": 1.0, "rescale_betas_zero_snr": False}
SCHEDULER_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {**_BETAS, **_STEPS, **_CLIPS},
    "DDIMScheduler": {**_BETAS, **_STEPS, **_CLIPS, "set_alpha_to_one": True},
    "PNDMScheduler": {**_BETAS, **_STEPS, "set_alpha_to_one": False},
}
SCHEDULER_FIXED: dict[str, Any] = {
    "trained_betas": None,
    "thresholding": False,
    "timestep_values": None,
    "predict_epsilon": True,
}
"""Keys, the last two of old versions, with the one value that jaxdiff has."""
SCHEDULER_UNUSED = {
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "skip_prk_steps": (False, True),
    "tensor_format": ("pt", "np"),
}
"""Keys that choose between ways of one sampler, and their values: the choice is the user's when sampling."""
THRESHOLDING_ONLY = {"dynamic_thresholding_ratio", "sample_max_value"}
"""Keys that mean nothing without thresholding."""

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTION_TYPES = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}


def translate_unet(path: Path) -> tuple[UNetConfig, int]:
    """Return the layout, and the image size in pixels, of the config.json of a UNet2DModel.

    Raises:
      InputError: another class, or a key or value that jaxdiff does not have.
    """
    given = read_strict_json(path)
    _check_class(path, given, ("UNet2DModel",))
    given.pop("_name_or_path", None)
    fields = _with_defaults(path, given, UNET_DEFAULTS, UNET_FIXED)
    size = fields["sample_size"]
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if type(size) is not int:
        raise InputError(f"{path}: sample_size is {size!r}, not the height and width of square images")
    scale_shift = _look_up(path, "resnet_time_scale_shift", fields, {"default": False, "scale_shift": True})
    # None means no norm in the middle's attention where the embedding scales and shifts; jaxdiff always has one.
    groups = (fields["norm_num_groups"],) if scale_shift else (None, fields["norm_num_groups"])
    if fields["attn_norm_num_groups"] not in groups:
        raise InputError(
            f"{path}: attn_norm_num_groups is {fields['attn_norm_num_groups']!r}; jaxdiff only has {groups[-1]!r} here"
        )
    attention = _attention_levels(path, fields["down_block_types"], fields["up_block_types"])
    rest = {"attention": attention, "scale_shift": scale_shift, "patch_size": 1, "num_classes": 0, "num_domains": 0}
    try:
        return decode(UNetConfig, {name: fields[name] for name in SAME_NAMES} | rest), size
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def translate_scheduler(path: Path) -> tuple[ForwardProcess, SamplingDefaults]:
    """Return what a scheduler_config.json says of training and of sampling.

    Raises:
      InputError: another class, or a key or value that jaxdiff does not have.
    """
    given = read_strict_json(path)
    kind = _check_class(path, given, tuple(SCHEDULER_DEFAULTS))
    for name in THRESHOLDING_ONLY if kind != "PNDMScheduler" else ():
        given.pop(name, None)
    for name, values in SCHEDULER_UNUSED.items():
        if given.get(name, values[0]) not in values:
            raise InputError(f"{path}: {name} is {given[name]!r}; jaxdiff only has {', '.join(map(repr, values))}")
        given.pop(name, None)
    fields = {"clip_sample": False, "clip_sample_range": 1.0, "rescale_betas_zero_snr": False, "set_alpha_to_one": True}
    fields |= _with_defaults(path, given, SCHEDULER_DEFAULTS[kind], SCHEDULER_FIXED)
    spacing = _look_up(path, "timestep_spacing", fields, {name: name for name in ("leading", "trailing", "linspace")})
    if fields["clip_sample"] and fields["clip_sample_range"] != 1:
        raise InputError(f"{path}: clip_sample_range is {fields['clip_sample_range']!r}; jaxdiff only has 1")
    diffusion = {
        "schedule": _look_up(path, "beta_schedule", fields, SCHEDULES),
        "num_train_timesteps": fields["num_train_timesteps"],
        "beta_start": fields["beta_start"],
        "beta_end": fields["beta_end"],
        "prediction_type": _look_up(path, "prediction_type", fields, PREDICTION_TYPES),
        "zero_terminal_snr": fields["rescale_betas_zero_snr"],
    }
    try:
        ends_clean = decode(bool, fields["set_alpha_to_one"], "set_alpha_to_one")
        sampling = {
            "spacing": spacing,
            "steps_offset": fields["steps_offset"],
            "final": -1 if ends_clean else 0,
            "clip": fields["clip_sample"],
        }
        return decode(ForwardProcess, diffusion), decode(SamplingDefaults, sampling)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _check_class(path: Path, given: dict[str, Any], known: tuple[str, ...]) -> str:
    """Take the entries that every config has out of it, and return its class."""
    kind = given.pop("_class_name", None)
    given.pop("_diffusers_version", None)
    if kind not in known:
        raise InputError(f"{path}: _class_name is {kind!r}; jaxdiff only has {', '.join(known)}")
    return kind


def _with_defaults(
    path: Path, given: dict[str, Any], defaults: dict[str, Any], fixed: dict[str, Any]
) -> dict[str, Any]:
    """Return the fields that may vary, having checked that the others are as jaxdiff has them."""
    if unknown := sorted(given.keys() - defaults.keys() - fixed.keys()):
        raise InputError(f"{path}: {unknown[0]} is {given[unknown[0]]!r}, but jaxdiff does not know this key")
    for name, only in fixed.items():
        if given.get(name, only) != only:
            raise InputError(f"{path}: {name} is {given[name]!r}; jaxdiff only has {only!r}")
    return {name: given.get(name, default) for name, default in defaults.items()}


def _look_up(path: Path, name: str, fields: dict[str, Any], table: dict[str, Any]) -> Any:
    """Translate one value of few."""
    value = fields[name]
    if not isinstance(value, str) or value not in table:
        raise InputError(f"{path}: {name} is {value!r}; jaxdiff only has {', '.join(map(repr, table))}")
    return table[value]


def _attention_levels(path: Path, down: Any, up: Any) -> list[bool]:
    """Return whether each level attends, having checked that the way up mirrors the way down."""
    kinds: dict[str, bool] = {"DownBlock2D": False, "AttnDownBlock2D": True}
    for kind in down if isinstance(down, list) else [down]:
        if not isinstance(kind, str) or kind not in kinds:
            raise InputError(f"{path}: down_block_types has {kind!r}; jaxdiff only has {', '.join(kinds)}")
    if up != [kind.replace("Down", "Up") for kind in reversed(down)]:
        raise InputError(f"{path}: up_block_types is {up!r}, which does not mirror down_block_types, as in jaxdiff")
    return [kinds[kind] for kind in down]
