"""Published CLIP models under the names and with the calls of transformers 4's Flax classes.

    from jaxdiff import FlaxCLIPModel
    model = FlaxCLIPModel.from_pretrained("openai/clip-vit-base-patch32")
    outputs = model(input_ids, pixel_values, attention_mask)

Parameters are float32 whatever the files hold; `dtype` is what the networks compute in. Every call is compiled.
`train` and `dropout_rng` are taken for the sake of old scripts: CLIP has no dropout.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxdiff.errors import InputError
from jaxdiff.models.clip import CLIP, CLIPText, CLIPVision, Encoded
from jaxdiff.models.clip_config import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    read_clip_config,
    to_dict,
    tower_config,
)
from jaxdiff.recipes.model_outputs import (
    FlaxBaseModelOutputWithPooling,
    FlaxCLIPOutput,
    FlaxCLIPTextModelOutput,
    FlaxCLIPVisionModelOutput,
)
from jaxdiff.recipes.pretrained_model import FlaxPreTrainedModel

BUFFERS = r"(.*\.)?embeddings\.position_ids"
"""What torch modules of before 2023 saved beside their parameters: 0, 1, 2, ..."""


def ignoring(*parts: str) -> str:
    """Return the regular expression of buffers and of the parts of a whole model that another class holds."""
    return "|".join([BUFFERS, *(rf"{part}(\..*)?" for part in parts)])


class _CLIPBase(FlaxPreTrainedModel):
    """Checks of the inputs and the compiled call."""

    def config_dict(self) -> dict[str, Any]:
        """Return what config.json says of this model."""
        config = self.config.to_dict() if type(self.config) is CLIPConfig else to_dict(self.config)
        return {**config, "architectures": [type(self).__name__.removeprefix("Flax")]}

    @functools.cached_property
    def _compiled(self) -> Any:
        def run(params: Any, method: str, keep_states: bool, inputs: dict[str, Any]) -> Any:
            if "images" in inputs:
                # transformers' processors put channels second, linen networks last.
                inputs["images"] = jnp.transpose(inputs["images"], (0, 2, 3, 1))
            outputs = self.module.apply({"params": params}, method=method, **inputs)

            def drop_states(output: Any) -> Any:
                kept = isinstance(output, Encoded) and not keep_states
                return output._replace(hidden_states=None) if kept else output

            return tuple(drop_states(output) for output in outputs)

        return jax.jit(run, static_argnums=(1, 2))

    def _apply(
        self,
        inputs: dict[str, Any],
        params: Any,
        train: bool,
        method: str = "__call__",
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> tuple[Any, ...]:
        """Check the inputs that are not None and run a method of the module on them."""
        config = self.config
        towers: list[Any] = [config.text_config, config.vision_config] if type(config) is CLIPConfig else [config]
        if train and any(tower.attention_dropout for tower in towers):
            raise InputError("train=True: attention_dropout is not supported; set it to 0 in the config")
        if output_attentions:
            raise InputError("output_attentions=True: attention weights are not kept")
        inputs = {name: jnp.asarray(value) for name, value in inputs.items() if value is not None}
        for tower in towers:
            (check_text if isinstance(tower, CLIPTextConfig) else check_images)(tower, inputs)
        return self._compiled(self.params if params is None else params, method, bool(output_hidden_states), inputs)


class FlaxCLIPModel(_CLIPBase):
    """Both transformers with their projections, and the scaled cosine of their embeddings."""

    ignored = BUFFERS

    @classmethod
    def make_module(cls, config: CLIPConfig, dtype: DTypeLike) -> CLIP:
        """Return the linen module."""
        return CLIP(config, dtype)

    @classmethod
    def read_config(cls, values: Mapping[str, Any]) -> CLIPConfig:
        """Return the config that a config.json describes."""
        return read_clip_config(values)

    def example(self) -> dict[str, Any]:
        """Return the smallest input of the module."""
        return {"input_ids": blank_text(), "images": blank_image(self.config.vision_config)}

    def __call__(
        self,
        input_ids: ArrayLike,
        pixel_values: ArrayLike,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        params: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Compare every image with every text; `pixel_values` have channels second, as processors give them."""
        inputs = {
            "input_ids": input_ids,
            "images": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        logits, text_embeds, image_embeds, text, image = self._apply(
            inputs, params, train, "__call__", output_attentions, output_hidden_states
        )
        outputs = FlaxCLIPOutput(
            logits,
            logits.T,
            text_embeds,
            image_embeds,
            FlaxBaseModelOutputWithPooling(*text),
            FlaxBaseModelOutputWithPooling(*image),
        )
        return outputs.to_tuple() if return_dict is False else outputs

    def get_text_features(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        params: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
    ) -> jax.Array:
        """Return the text embeddings, not normalized."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self._apply(inputs, params, train, "encode_text")[1]

    def get_image_features(
        self, pixel_values: ArrayLike, params: Any = None, dropout_rng: Any = None, train: bool = False
    ) -> jax.Array:
        """Return the image embeddings, not normalized."""
        return self._apply({"images": pixel_values}, params, train, "encode_image")[1]


class FlaxCLIPTextModel(_CLIPBase):
    """The text transformer, as Stable Diffusion conditions on it."""

    ignored = ignoring("vision_model", "text_projection", "visual_projection", "logit_scale")
    prefix = "text_model."
    projected = False

    @classmethod
    def make_module(cls, config: CLIPTextConfig, dtype: DTypeLike) -> CLIPText:
        """Return the linen module."""
        return CLIPText(config, cls.projected, dtype)

    @classmethod
    def read_config(cls, values: Mapping[str, Any]) -> CLIPTextConfig:
        """Return the config that a config.json describes, of a text transformer or of a whole model."""
        return tower_config(values, CLIPTextConfig)

    def example(self) -> dict[str, Any]:
        """Return the smallest input of the module."""
        return {"input_ids": blank_text()}

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        params: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Encode texts."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        encoded, embeds = self._apply(inputs, params, train, "__call__", output_attentions, output_hidden_states)
        outputs = (
            FlaxCLIPTextModelOutput(embeds, encoded.last_hidden_state, encoded.hidden_states)
            if self.projected
            else FlaxBaseModelOutputWithPooling(*encoded)
        )
        return outputs.to_tuple() if return_dict is False else outputs


class FlaxCLIPTextModelWithProjection(FlaxCLIPTextModel):
    """The text transformer and its projection."""

    ignored = ignoring("vision_model", "visual_projection", "logit_scale")
    prefix = ""
    projected = True


class FlaxCLIPVisionModel(_CLIPBase):
    """The vision transformer."""

    ignored = ignoring("text_model", "text_projection", "visual_projection", "logit_scale")
    prefix = "vision_model."
    projected = False

    @classmethod
    def make_module(cls, config: CLIPVisionConfig, dtype: DTypeLike) -> CLIPVision:
        """Return the linen module."""
        return CLIPVision(config, cls.projected, dtype)

    @classmethod
    def read_config(cls, values: Mapping[str, Any]) -> CLIPVisionConfig:
        """Return the config that a config.json describes, of a vision transformer or of a whole model."""
        return tower_config(values, CLIPVisionConfig)

    def example(self) -> dict[str, Any]:
        """Return the smallest input of the module."""
        return {"images": blank_image(self.config)}

    def __call__(
        self,
        pixel_values: ArrayLike,
        params: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Encode images; `pixel_values` have channels second, as processors give them."""
        encoded, embeds = self._apply(
            {"images": pixel_values}, params, train, "__call__", output_attentions, output_hidden_states
        )
        outputs = (
            FlaxCLIPVisionModelOutput(embeds, encoded.last_hidden_state, encoded.hidden_states)
            if self.projected
            else FlaxBaseModelOutputWithPooling(*encoded)
        )
        return outputs.to_tuple() if return_dict is False else outputs


class FlaxCLIPVisionModelWithProjection(FlaxCLIPVisionModel):
    """The vision transformer and its projection."""

    ignored = ignoring("text_model", "text_projection", "logit_scale")
    prefix = ""
    projected = True


def blank_text() -> jax.Array:
    """Return one text of one token."""
    return jnp.zeros((1, 1), jnp.int32)


def blank_image(config: CLIPVisionConfig) -> jax.Array:
    """Return one image of the model's size, channels last."""
    return jnp.zeros((1, config.image_size, config.image_size, config.num_channels))


def check_text(config: CLIPTextConfig, inputs: dict[str, jax.Array]) -> None:
    """Raise InputError unless the token ids, where there are any, fit the model; add the axis of a single text."""
    for name in ("input_ids", "attention_mask", "position_ids"):
        if name in inputs:
            inputs[name] = jnp.atleast_2d(inputs[name]).astype(jnp.int32)
    ids = inputs.get("input_ids")
    if ids is None:
        return
    if ids.shape[1] > config.max_position_embeddings:
        raise InputError(
            f"input_ids: {ids.shape[1]} tokens, more than the {config.max_position_embeddings} positions of the model: "
            "shorten the text, or let the tokenizer truncate it"
        )
    # Inside another program the numbers are not known yet.
    if not isinstance(ids, jax.core.Tracer) and ids.size:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= config.vocab_size:
            raise InputError(
                f"input_ids: {low if low < 0 else high} is not in 0..{config.vocab_size - 1}: the tokenizer is another "
                "model's"
            )


def check_images(config: CLIPVisionConfig, inputs: dict[str, jax.Array]) -> None:
    """Raise InputError unless the images, where there are any, fit the model."""
    images = inputs.get("images")
    wanted = (config.num_channels, config.image_size, config.image_size)
    if images is not None and images.shape[1:] != wanted:
        channels, height, width = wanted
        raise InputError(
            f"pixel_values: shape {images.shape}, but the model takes (images, {channels}, {height}, {width}), "
            "channels second"
        )
