"""The numbers that decide a CLIP model's shapes and function, read from the `config.json` beside its weights.

A key that is missing has the value of OpenAI's ViT-B/32, as in transformers, which leaves such keys out when it writes.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from jaxdiff.errors import InputError

ACTIVATIONS = ("quick_gelu", "gelu")
"""OpenAI trained with x sigmoid(1.702 x), OpenCLIP with x Phi(x); with the wrong one accuracy drops by points."""

LEGACY_EOS = 2
"""What old config.json files give as the end-of-text id, which never was the vocabulary's."""
CLIP_EOS = 49407
"""The end-of-text id of CLIP's own vocabulary."""


@dataclass(frozen=True)
class CLIPTextConfig:
    """The text transformer.

    Attributes:
      projection_dim: features of the text embedding, where the model has a projection of its own.
      max_position_embeddings: most tokens of a prompt, begin and end of text included.
      hidden_act: activation of the feed-forward layers, see `ACTIVATIONS`.
      eos_token_id: id of the end-of-text token, whose position holds the pooled output.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int = CLIP_EOS

    def __post_init__(self):
        check_tower(self)


@dataclass(frozen=True)
class CLIPVisionConfig:
    """The vision transformer.

    Attributes:
      projection_dim: features of the image embedding, where the model has a projection of its own.
      image_size: height and width of an image, in pixels.
      patch_size: height and width of a patch, in pixels; pixels right and below of the last whole patch are unseen.
      hidden_act: activation of the feed-forward layers, see `ACTIVATIONS`.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0

    def __post_init__(self):
        check_tower(self)
        if self.patch_size > self.image_size:
            raise InputError(f"patch_size {self.patch_size} is more than image_size {self.image_size}")

    @property
    def num_positions(self) -> int:
        """Tokens of an image: its patches and the class token before them."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
class CLIPConfig:
    """Both transformers and the space that they meet in; this `projection_dim` counts, not the transformers' own."""

    text_config: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision_config: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    def __post_init__(self):
        if self.projection_dim < 1:
            raise InputError(f"projection_dim must be at least 1, got {self.projection_dim}")

    def to_dict(self) -> dict[str, Any]:
        """Return what transformers' `CLIPConfig.from_pretrained` reads."""
        towers = {"text_config": to_dict(self.text_config), "vision_config": to_dict(self.vision_config)}
        return {"model_type": "clip", "architectures": ["CLIPModel"], **asdict(self), **towers}


def check_tower(config: CLIPTextConfig | CLIPVisionConfig) -> None:
    """Raise InputError for numbers that no network has, and for an activation that is not known."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.type is int and entry.name != "eos_token_id" and value < 1:
            raise InputError(f"{entry.name} must be at least 1, got {value}")
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"hidden_size {config.hidden_size} does not split into num_attention_heads {config.num_attention_heads}"
        )
    if config.hidden_act not in ACTIVATIONS:
        raise InputError(f"hidden_act {config.hidden_act!r} is not known: it must be {' or '.join(ACTIVATIONS)}")


WITHOUT_EFFECT = frozenset(
    # Where a file comes from, and what its numbers were.
    ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "finetuning_task")
    + ("task_specific_params", "tokenizer_class", "prefix", "problem_type", "id2label", "label2id", "num_labels")
    + ("transformers.js_config", "auto_map")
    # Training: how parameters begin, and what is dropped or computed again.
    + ("initializer_range", "initializer_factor", "dropout", "gradient_checkpointing")
    # How a call is computed and what it returns, not what of.
    + ("chunk_size_feed_forward", "return_dict", "output_attentions", "output_hidden_states", "output_scores")
    + ("attn_implementation", "return_dict_in_generate", "torchscript", "use_bfloat16", "use_cache", "tf_legacy_loss")
    # Language models alone, which write: CLIP's transformers have no head, no decoder and draw no words.
    + ("tie_word_embeddings", "tie_encoder_decoder", "cross_attention_hidden_size", "decoder_start_token_id")
    + ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "max_length", "min_length", "do_sample")
    + ("early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p")
    + ("typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size")
    + ("bad_words_ids", "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens")
    + ("begin_suppress_tokens", "remove_invalid_values", "exponential_decay_length_penalty")
)
"""Keys that transformers 4 and 5 write into any model's config, and that change nothing of what CLIP computes.

The ids of tokens count for the text transformer, which has fields for them.
"""
OTHER_NETWORKS = ("pruned_heads", "add_cross_attention", "is_decoder", "is_encoder_decoder")
"""Keys of any model's config that ask for another network, unless they are false or empty."""
OF_WHOLE = ("projection_dim", "logit_scale_init_value") + tuple(
    f"{tower}_config{end}" for tower in ("text", "vision") for end in ("", "_dict")
)
"""Keys of a whole model's own."""


def check_keys(values: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise InputError, naming the key, if a config says what jaxdiff does not know or does not have."""
    for key, value in values.items():
        if key in OTHER_NETWORKS and value:
            raise InputError(f"{key} {value!r} asks for another network than CLIP's")
        if key.startswith("_") or key in (*OTHER_NETWORKS, *known) or key in WITHOUT_EFFECT or value is None:
            continue
        raise InputError(f"{key} is {value!r}, but jaxdiff does not know this key")


TowerConfig = TypeVar("TowerConfig", CLIPTextConfig, CLIPVisionConfig)
MODEL_TYPES = {CLIPTextConfig: "clip_text_model", CLIPVisionConfig: "clip_vision_model"}


def to_dict(config: CLIPTextConfig | CLIPVisionConfig) -> dict[str, Any]:
    """Return what transformers reads as the config of one transformer."""
    return {"model_type": MODEL_TYPES[type(config)], **asdict(config)}


def read_clip_config(values: Mapping[str, Any]) -> CLIPConfig:
    """Return the config of a whole model from the contents of its config.json.

    Raises:
      InputError: another model's, or a value that is not known here; the message names it.
    """
    require_type(values, "clip")
    text, vision = tower_config(values, CLIPTextConfig), tower_config(values, CLIPVisionConfig)
    scale = values.get("logit_scale_init_value")
    return CLIPConfig(text, vision, text.projection_dim, *() if scale is None else (float(scale),))


def tower_config(values: Mapping[str, Any], kind: type[TowerConfig]) -> TowerConfig:
    """Return the config of one transformer from its own config.json or from that of a whole model.

    Raises:
      InputError: another model's, or a value that is not known here; the message names it.
    """
    require_type(values, "clip", MODEL_TYPES[kind])
    if values.get("model_type", "clip") == "clip":
        try:
            check_keys(values, OF_WHOLE)
        except InputError as error:
            raise InputError(f"config.json: {error}") from error
        name = "text_config" if kind is CLIPTextConfig else "vision_config"
        # Where an old file has both, its `..._dict` counts.
        own = values.get(f"{name}_dict") or values.get(name) or {}
        if not isinstance(own, Mapping):
            raise InputError(f"config.json: {name} must be an object, got {own!r}")
        # Its own projection_dim is often a left-over.
        values = {**own, "projection_dim": values.get("projection_dim")}
    try:
        check_keys(values, {entry.name for entry in fields(kind)})
        return kind(**given_fields(values, kind))
    except InputError as error:
        raise InputError(f"config.json: {error}") from error


JSON_TYPES: dict[Any, tuple[Any, str]] = {str: (str, "text"), float: (int | float, "a number")}
"""Types other than whole numbers, by those of the fields, and what they are called."""


def given_fields(values: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return the fields that the values give, each of a fitting type.

    Raises:
      InputError: a value is of another type; the message names it.
    """
    given = {}
    for entry in fields(kind):
        value = values.get(entry.name)
        if value is None:
            continue
        if entry.name in ("image_size", "patch_size") and isinstance(value, list | tuple) and len(set(value)) == 1:
            value = value[0]
        wanted, name = JSON_TYPES.get(entry.type, (int, "one whole number"))
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise InputError(f"{entry.name} must be {name}, got {value!r}")
        given[entry.name] = float(value) if entry.type is float else value
    return given


def require_type(values: Mapping[str, Any], *known: str) -> None:
    """Raise InputError unless the config.json is of one of the known model types."""
    found = values.get("model_type", "clip")
    if found not in known:
        raise InputError(f"config.json: model_type is {found!r}, not {' or '.join(map(repr, known))}")
