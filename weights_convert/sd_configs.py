"""The JSON files of a Stable Diffusion folder, and the layout that they describe.

A single file has none of them: programs that read one assume the settings of the published models. So a folder's
settings are what a single file implies, or no single file can be made of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxdiff.errors import InputError
from jaxdiff.io.strict_json import decode, read_strict_json
from jaxdiff.io.weights import LazyTensors
from jaxdiff.models.clip_config import OTHER_NETWORKS, WITHOUT_EFFECT, check_keys
from jaxdiff.recipes.diffusers_autoencoder import AUTOENCODER, AUTOENCODER_FIXED
from jaxdiff.recipes.diffusers_latent_unet import LATENT_UNET, LATENT_UNET_FIXED
from weights_convert.sd_layout import Layout, TextLayout, UNetLayout, VAELayout
from weights_convert.sd_tables import Row, text_rows, unet_rows, vae_rows

DIFFUSERS_VERSION = "0.39.0"
"""Whose layout the configs have: the last with Flax classes."""
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
}
SCHEDULE_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
}

NO_ACCOUNT = {
    "unet": {"sample_size", "upcast_attention", "dropout", "addition_embed_type_num_heads", "split_head_dim"}
    | {"use_memory_efficient_attention"},
    "vae": {"sample_size", "force_upcast"},
    # Those of other networks are refused when a folder is read.
    "text_encoder": {"projection_dim", *WITHOUT_EFFECT, *OTHER_NETWORKS},
}
"""Keys that change neither tensors nor what is computed of them, but for its precision."""
UNET_DEFAULTS, VAE_DEFAULTS = (
    {key: value for key, value in keys.items() if value is not None and key not in NO_ACCOUNT[part]}
    for part, keys in (("unet", LATENT_UNET | LATENT_UNET_FIXED), ("vae", AUTOENCODER | AUTOENCODER_FIXED))
)
TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}
"""What a key that a file lacks means, by the class. Keys that are not here must be null, or are of no account."""


@dataclass(frozen=True)
class Config:
    """A network's config.json, and the table of its tensors."""

    json: Mapping[str, Any]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Pipeline:
    """A model, its tensors not read yet.

    Attributes:
      layout: of the three networks.
      configs: of each network, by the name of its sub-folder.
      networks: tensors of each network, by the folder's names.
      scheduler: scheduler_config.json.
    """

    layout: Layout
    configs: Mapping[str, Config]
    networks: Mapping[str, LazyTensors]
    scheduler: Mapping[str, Any]

    @property
    def image_size(self) -> int:
        """Height and width of the pictures that the model was trained with, in pixels."""
        size = self.configs["unet"].json.get("sample_size")
        return (size if type(size) is int else 64) * 2 ** (len(self.layout.vae.channels) - 1)


def implied_configs(layout: Layout, size: int, prediction_type: str = "epsilon") -> dict[str, Config]:
    """Return the configs that a single file of this layout implies.

    Args:
      layout: of the three networks.
      size: height and width of the pictures that the model was trained with, in pixels.
      prediction_type: what the network predicts, in diffusers' words.

    Raises:
      InputError: it has sizes that those settings cannot part into groups or heads; the message does not name the file.
    """
    unets, vaes, text_width = layout.unet.channels, layout.vae.channels, layout.text_encoder.width
    if odd := [width for width in (*unets, *vaes) if width % 32]:
        raise InputError(f"a network has {odd[0]} channels, which its norms cannot part into 32 groups")
    if odd := [width for width in (text_width, *(unets if layout.version == 2 else ())) if width % 64]:
        raise InputError(f"a network has {odd[0]} channels, which cannot be parted into heads of 64")
    unet, vae, text = layout.unet, layout.vae, layout.text_encoder
    downs = [f"{'CrossAttn' if attends else ''}DownBlock2D" for attends in unet.attends]
    ups = [f"{'CrossAttn' if attends else ''}UpBlock2D" for attends in reversed(unet.attends)]
    heads = [width // 64 for width in unet.channels] if layout.version == 2 else 8
    sample_size = size // 2 ** (len(vae.channels) - 1)
    jsons: dict[str, dict[str, Any]] = {
        "unet": {
            "in_channels": unet.in_channels,
            "out_channels": unet.out_channels,
            "sample_size": sample_size,
            "block_out_channels": list(unet.channels),
            "layers_per_block": unet.layers,
            "down_block_types": downs,
            "up_block_types": ups,
            "attention_head_dim": heads,
            "cross_attention_dim": unet.context,
            "use_linear_projection": unet.linear,
            # As published for 2.1, whose scores of attention float16 cannot hold; 2.0 loses nothing by it but time.
            **({"upcast_attention": True} if layout.version == 2 and prediction_type == "v_prediction" else {}),
            **{name: UNET_DEFAULTS[name] for name in ("act_fn", "downsample_padding", "flip_sin_to_cos", "freq_shift")},
            **{name: UNET_DEFAULTS[name] for name in ("mid_block_scale_factor", "norm_eps", "norm_num_groups")},
        },
        "vae": {
            "in_channels": vae.in_channels,
            "out_channels": vae.out_channels,
            "sample_size": size,
            "block_out_channels": list(vae.channels),
            "layers_per_block": vae.layers,
            "latent_channels": vae.latent_channels,
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(vae.channels),
            **{name: VAE_DEFAULTS[name] for name in ("act_fn", "norm_num_groups", "scaling_factor")},
        },
        "text_encoder": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": text.tokens,
            "max_position_embeddings": text.positions,
            "hidden_size": text.width,
            "intermediate_size": text.hidden,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.width // 64,
            "hidden_act": "gelu" if text.open_clip else "quick_gelu",
            "layer_norm_eps": TEXT_DEFAULTS["layer_norm_eps"],
            "projection_dim": 512 if text.open_clip else text.width,
            # As published: the first two are not the tokens' ids, which the tokenizer knows.
            **{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
        },
    }
    for part in ("unet", "vae"):
        jsons[part] = {"_class_name": CLASSES[part], "_diffusers_version": DIFFUSERS_VERSION, **jsons[part]}
    return _with_rows(layout, jsons)


def implied_scheduler(prediction_type: str, zero_terminal_snr: bool = False) -> dict[str, Any]:
    """Return the scheduler_config.json of the published models: PNDM, but DDIM for 2.x, which predicts v.

    Args:
      prediction_type: what the network predicts, in diffusers' words.
      zero_terminal_snr: whether its last timestep is pure noise; then its samples must begin there (arXiv 2305.08891).
    """
    pndm = {"skip_prk_steps": True} if prediction_type == "epsilon" else {}
    return {
        "_class_name": "PNDMScheduler" if pndm else "DDIMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        **SCHEDULE,
        "prediction_type": prediction_type,
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
        **pndm,
        **({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_terminal_snr else {}),
    }


def read_configs(folder: Path) -> tuple[Layout, dict[str, Config]]:
    """Return the layout and the configs of a pipeline's folder, those of Flax classes as those of torch's.

    Raises:
      InputError: a file is missing, or describes another network.
    """
    jsons = {part: read_strict_json(folder / part / "config.json") for part in CLASSES}
    for part in ("unet", "vae"):
        name = jsons[part].get("_class_name")
        if str(name).removeprefix("Flax") != CLASSES[part]:
            raise InputError(f"{folder / part / 'config.json'}: _class_name is {name!r}, not {CLASSES[part]}")
        jsons[part]["_class_name"] = CLASSES[part]
    layouts: dict[str, Any] = {}
    for part, make in {"unet": _unet_layout, "vae": _vae_layout, "text_encoder": _text_layout}.items():
        try:
            layouts[part] = make(jsons[part])
        except ValueError as error:
            raise InputError(f"{folder / part / 'config.json'}: {error}") from error
    try:
        layout = Layout(**layouts)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    return layout, _with_rows(layout, jsons)


def check_standard(name: str, pipeline: Pipeline) -> str:
    """Check that a single file implies all that a pipeline's configs say; return its prediction type.

    Raises:
      InputError: it does not; the message names the setting.
    """
    try:
        implied = implied_configs(pipeline.layout, pipeline.image_size)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    if (tokens := pipeline.layout.text_encoder.tokens) > (usual := TEXT_DEFAULTS["vocab_size"]):
        raise InputError(
            f"{name}, text_encoder: its token table has {tokens} rows, but programs that read single files know "
            f"{usual} tokens: save the added rows as learned embeddings instead, or convert to a folder"
        )
    defaults = {"unet": UNET_DEFAULTS, "vae": VAE_DEFAULTS, "text_encoder": TEXT_DEFAULTS}
    for part, config in pipeline.configs.items():
        given = {key: value for key, value in config.json.items() if not key.startswith("_")}
        for key in defaults[part].keys() | given.keys() - NO_ACCOUNT[part]:
            usual = implied[part].json.get(key, defaults[part].get(key))
            found = given.get(key, defaults[part].get(key))
            if key == "attention_head_dim":
                levels = len(pipeline.layout.unet.channels)
                usual, found = ([value] * levels if type(value) is int else value for value in (usual, found))
            if found != usual:
                raise InputError(f"{name}, {part}: {key} is {found!r}; programs that read single files take {usual!r}")
    fields = SCHEDULE_DEFAULTS | dict(pipeline.scheduler)
    for key, usual in (SCHEDULE | {"rescale_betas_zero_snr": False}).items():
        if fields[key] != usual:
            raise InputError(
                f"{name}, scheduler: {key} is {fields[key]!r}; programs that read single files take {usual!r}"
            )
    if fields["prediction_type"] not in ("epsilon", "v_prediction"):
        raise InputError(
            f"{name}, scheduler: prediction_type is {fields['prediction_type']!r}, not epsilon or v_prediction"
        )
    return fields["prediction_type"]


def _with_rows(layout: Layout, jsons: Mapping[str, Mapping[str, Any]]) -> dict[str, Config]:
    rows = {
        "unet": unet_rows(layout.unet),
        "vae": vae_rows(layout.vae),
        "text_encoder": text_rows(layout.text_encoder),
    }
    return {part: Config(jsons[part], tuple(table)) for part, table in rows.items()}


def _unet_layout(given: Mapping[str, Any]) -> UNetLayout:
    fields = UNET_DEFAULTS | dict(given)
    attends = tuple(kind == "CrossAttnDownBlock2D" for kind in _get(fields, "down_block_types", tuple[str, ...]))
    for way, levels in (("Down", attends), ("Up", attends[::-1])):
        _check_blocks(fields, way, [f"{'CrossAttn' if level else ''}{way}Block2D" for level in levels])
    return UNetLayout(
        in_channels=_get(fields, "in_channels"),
        out_channels=_get(fields, "out_channels"),
        channels=_channels(fields),
        layers=_get(fields, "layers_per_block"),
        attends=attends,
        context=_get(fields, "cross_attention_dim"),
        linear=_get(fields, "use_linear_projection", bool),
    )


def _vae_layout(given: Mapping[str, Any]) -> VAELayout:
    fields = VAE_DEFAULTS | dict(given)
    for way, kind in (("Down", "DownEncoderBlock2D"), ("Up", "UpDecoderBlock2D")):
        _check_blocks(fields, way, [kind] * len(_channels(fields)))
    return VAELayout(
        in_channels=_get(fields, "in_channels"),
        out_channels=_get(fields, "out_channels"),
        channels=_channels(fields),
        layers=_get(fields, "layers_per_block"),
        latent_channels=_get(fields, "latent_channels"),
    )


def _text_layout(given: Mapping[str, Any]) -> TextLayout:
    check_keys(given, {*TEXT_DEFAULTS, "projection_dim"})
    fields = TEXT_DEFAULTS | dict(given)
    if fields["hidden_act"] not in ("quick_gelu", "gelu"):
        raise ValueError(f"hidden_act is {fields['hidden_act']!r}, where jaxdiff has quick_gelu and gelu")
    return TextLayout(
        tokens=_get(fields, "vocab_size"),
        positions=_get(fields, "max_position_embeddings"),
        width=_get(fields, "hidden_size"),
        hidden=_get(fields, "intermediate_size"),
        layers=_get(fields, "num_hidden_layers"),
        open_clip=fields["hidden_act"] == "gelu",
    )


def _get(fields: Mapping[str, Any], name: str, kind: Any = int) -> Any:
    return decode(kind, fields[name], name)


def _channels(fields: Mapping[str, Any]) -> tuple[int, ...]:
    channels = _get(fields, "block_out_channels", tuple[int, ...])
    if len(channels) != len(_get(fields, "down_block_types", tuple[str, ...])):
        raise ValueError(f"block_out_channels has {len(channels)} levels, down_block_types another number")
    return channels


def _check_blocks(fields: Mapping[str, Any], way: str, expected: list[str]) -> None:
    """Check the types of the blocks that go up or down."""
    name = f"{way.lower()}_block_types"
    if list(_get(fields, name, tuple[str, ...])) != expected:
        raise ValueError(f"{name} is {fields[name]}, where jaxdiff has {expected}")
